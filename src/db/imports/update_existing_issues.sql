-- import_update_issues
-- Updates locked issues from rows of a file, and stores their previous values for RevertImport. A null in `rows` means
-- that the column stays unchanged. Every part of the statement sees the issues as they were before it.
WITH rows AS MATERIALIZED (
    SELECT *
    FROM unnest(
        /* issue_ids */ $3::uuid[],
        /* titles */ $4::text[],
        /* descriptions */ $5::text[],
        /* priorities */ $6::int2[],
        /* statuses */ $7::int2[],
        /* assignee_ids */ $8::uuid[]
    ) AS r (id, title, description, priority, status, assignee_id)
), row_labels AS MATERIALIZED (
    SELECT *
    FROM unnest(/* labelled_issue_ids */ $11::uuid[], /* label_ids */ $12::uuid[]) AS l (issue_id, label_id)
), removed_labels AS (
    DELETE FROM issue_labels il USING rows r
    WHERE /* has_labels */ $10 AND il.issue_id = r.id
        AND NOT EXISTS (SELECT FROM row_labels l WHERE l.issue_id = il.issue_id AND l.label_id = il.label_id)
    RETURNING il.issue_id, il.label_id
), added_labels AS (
    INSERT INTO issue_labels (issue_id, label_id)
    SELECT issue_id, label_id FROM row_labels
    ON CONFLICT DO NOTHING
    RETURNING issue_id, label_id
), label_changes AS (
    SELECT issue_id, label_id AS removed_label_id, NULL AS added_label_id FROM removed_labels
    UNION ALL
    SELECT issue_id, NULL, label_id FROM added_labels
), previous_values AS (
    INSERT INTO import_issues (import_id, issue_id, version, title, description, priority, status, assignee_id,
        close_time, reopen_count, label_ids, comment_count)
    SELECT /* import_id */ $1, i.id, i.version + 1, i.title, i.description, i.priority, i.status, i.assignee_id,
        i.close_time, i.reopen_count,
        ARRAY(SELECT il.label_id FROM issue_labels il WHERE il.issue_id = i.id),
        (SELECT count(*) FROM comments c WHERE c.issue_id = i.id)
    FROM rows r JOIN issues i ON i.id = r.id
    WHERE r.title <> i.title
        OR r.description <> i.description
        OR r.priority <> i.priority
        OR r.status <> i.status
        OR /* has_assignee */ $9 AND r.assignee_id IS DISTINCT FROM i.assignee_id
        OR i.id IN (SELECT issue_id FROM label_changes)
    RETURNING issue_id
), unchanged AS (
    INSERT INTO import_issues (import_id, issue_id)
    SELECT /* import_id */ $1, r.id FROM rows r WHERE r.id NOT IN (SELECT issue_id FROM previous_values)
), updated AS (
    UPDATE issues i SET
        change_actor_id = /* caller_id */ $2,
        title = coalesce(r.title, i.title),
        description = coalesce(r.description, i.description),
        priority = coalesce(r.priority, i.priority),
        status = coalesce(r.status, i.status),
        assignee_id = CASE WHEN /* has_assignee */ $9 THEN r.assignee_id ELSE i.assignee_id END
    FROM rows r JOIN previous_values p ON p.issue_id = r.id
    WHERE i.id = r.id
    RETURNING i.id, i.version
)
SELECT
    (SELECT count(*) FROM updated) AS updated_count,
    insert_label_events(/* caller_id */ $2, array_agg(u.id), array_agg(u.version),
        array_agg(c.removed_label_id), array_agg(c.added_label_id))
FROM updated u JOIN label_changes c ON c.issue_id = u.id
