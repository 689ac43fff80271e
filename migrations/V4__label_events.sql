-- One function writes the events of labels. The trigger issues_before_update writes all other events, but does not know
-- which labels change with an UPDATE of issues.

-- Inserts an event for each label that was removed from an issue or added to it. Element n of each array belongs to change
-- n: the issue, its version after the change, and the label's id as removed or as added; the other of these two is NULL. An
-- array that is NULL has no elements.
--
-- Takes arrays, because an import changes the labels of thousands of issues in a statement: a call for each label would be
-- slower.
CREATE FUNCTION insert_label_events(
    actor_id          uuid,
    issue_ids         uuid[],
    versions          bigint[],
    removed_label_ids uuid[],
    added_label_ids   uuid[]
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
    SELECT change.issue_id, change.version, actor_id, 'label', change.removed_label_id, change.added_label_id
    FROM unnest(issue_ids, versions, removed_label_ids, added_label_ids)
        AS change (issue_id, version, removed_label_id, added_label_id);
END
$$;
