-- restore_updated_issues
-- Restores issues that an import has updated and that have not changed since. A label that was deleted since, or is being
-- deleted, cannot be restored. An issue without any other difference stays unchanged.
WITH previous AS MATERIALIZED (
    SELECT p.*
    FROM import_issues p JOIN issues i ON i.id = p.issue_id
    WHERE p.import_id = /* import_id */ $1 AND p.version = i.version
        AND p.comment_count = (SELECT count(*) FROM comments c WHERE c.issue_id = i.id)
), removed_labels AS (
    DELETE FROM issue_labels il USING previous p
    WHERE il.issue_id = p.issue_id AND il.label_id <> ALL (p.label_ids)
    RETURNING il.issue_id, il.label_id
), added_labels AS (
    INSERT INTO issue_labels (issue_id, label_id)
    SELECT p.issue_id, l.id
    FROM previous p CROSS JOIN unnest(p.label_ids) AS had (label_id) JOIN labels l ON l.id = had.label_id
    WHERE l.delete_actor_id IS NULL
    ON CONFLICT DO NOTHING
    RETURNING issue_id, label_id
), label_changes AS (
    SELECT issue_id, label_id AS removed_label_id, NULL AS added_label_id FROM removed_labels
    UNION ALL
    SELECT issue_id, NULL, label_id FROM added_labels
), restored AS (
    UPDATE issues i SET
        change_actor_id = /* actor_id */ $2,
        title = p.title,
        description = p.description,
        priority = p.priority,
        status = p.status,
        assignee_id = p.assignee_id,
        close_time = p.close_time,
        reopen_count = p.reopen_count
    -- A join: for IN inside OR, PostgreSQL would read label_changes again for each issue.
    FROM previous p LEFT JOIN (SELECT DISTINCT issue_id FROM label_changes) c ON c.issue_id = p.issue_id
    WHERE i.id = p.issue_id
        AND (i.title <> p.title
            OR i.description <> p.description
            OR i.priority <> p.priority
            OR i.status <> p.status
            OR i.assignee_id IS DISTINCT FROM p.assignee_id
            OR c.issue_id IS NOT NULL)
    RETURNING i.id, i.version
)
SELECT
    (SELECT count(*) FROM restored) AS restored_count,
    insert_label_events(/* actor_id */ $2, array_agg(r.id), array_agg(r.version),
        array_agg(c.removed_label_id), array_agg(c.added_label_id))
FROM restored r JOIN label_changes c ON c.issue_id = r.id
