-- update_issues
-- Judges each requested change, and applies those without a problem. No issue is requested twice.
-- `locked` has the rows as of when their locks were acquired; `issues` is seen as of when the statement started.
WITH requested AS (
    SELECT * FROM unnest(
        /* actor_id */ $1::uuid[],
        /* id */ $2::uuid[],
        /* expected_version */ $3::int8[],
        /* title */ $4::text[],
        /* description */ $5::text[],
        /* status */ $6::int2[],
        /* priority */ $7::int2[],
        /* sets_assignee */ $8::bool[],
        /* assignee_id */ $9::uuid[],
        /* external_id */ $10::text[],
        /* delete */ $11::bool[]
    ) WITH ORDINALITY AS change (
        actor_id, id, expected_version, title, description, status, priority, sets_assignee, assignee_id, external_id,
        delete, ordinal
    )
), locked AS (
    SELECT issue.* FROM issues issue WHERE issue.id = ANY(/* id */ $2) ORDER BY issue.id FOR NO KEY UPDATE
), judged AS (
    SELECT
        requested.*,
        locked.version,
        CASE
            WHEN locked.id IS NULL AND EXISTS (SELECT FROM issues issue WHERE issue.id = requested.id) THEN 'busy'
            WHEN locked.id IS NULL THEN 'missing'
            WHEN requested.expected_version NOT IN (0, locked.version) THEN 'stale'
            WHEN requested.delete IS NOT FALSE AND locked.delete_time IS NOT NULL THEN 'deleted'
            WHEN requested.delete IS FALSE AND locked.delete_time IS NULL THEN 'not deleted'
        END AS problem,
        requested.title <> locked.title
            OR requested.description <> locked.description
            OR requested.status <> locked.status
            OR requested.priority <> locked.priority
            OR requested.sets_assignee AND requested.assignee_id IS DISTINCT FROM locked.assignee_id
            OR requested.external_id <> coalesce(locked.external_id, '')
            OR requested.delete IS NOT NULL AS differs
    FROM requested LEFT JOIN locked ON locked.id = requested.id
), changed AS (
    UPDATE issues issue SET
        change_actor_id = judged.actor_id,
        title = coalesce(judged.title, issue.title),
        description = coalesce(judged.description, issue.description),
        status = coalesce(judged.status, issue.status),
        priority = coalesce(judged.priority, issue.priority),
        assignee_id = CASE WHEN judged.sets_assignee THEN judged.assignee_id ELSE issue.assignee_id END,
        external_id = CASE
            WHEN judged.external_id IS NULL THEN issue.external_id
            ELSE nullif(judged.external_id, '')
        END,
        delete_time = CASE
            WHEN judged.delete IS NULL THEN issue.delete_time
            WHEN judged.delete THEN now()
        END
    FROM judged
    WHERE issue.id = judged.id AND judged.differs AND judged.problem IS NULL
    RETURNING issue.*
)
SELECT
    judged.problem,
    judged.version AS judged_version,
    judged.version <> (SELECT version FROM issues WHERE id = judged.id) AS was_changed_meanwhile,
    issue.id,
    issue.title,
    issue.description,
    issue.status,
    issue.priority,
    issue.assignee_id,
    issue.reporter_id,
    issue.version,
    issue.external_id,
    issue.create_time,
    issue.update_time,
    issue.close_time,
    issue.delete_time,
    issue.reopen_count,
    (SELECT count(*)::int4 FROM comments comment WHERE comment.issue_id = issue.id AND comment.delete_time IS NULL)
        AS comment_count,
    carried.label_ids,
    carried.label_names,
    carried.label_descriptions
FROM judged
LEFT JOIN (
    SELECT * FROM changed
    UNION ALL
    SELECT * FROM locked WHERE NOT EXISTS (SELECT FROM changed WHERE changed.id = locked.id)
) issue ON issue.id = judged.id
LEFT JOIN LATERAL (
    SELECT
        array_agg(label.id ORDER BY lower(label.name)) AS label_ids,
        array_agg(label.name ORDER BY lower(label.name)) AS label_names,
        array_agg(label.description ORDER BY lower(label.name)) AS label_descriptions
    FROM issue_labels issue_label JOIN labels label ON label.id = issue_label.label_id
    WHERE issue_label.issue_id = judged.id
) carried ON true
ORDER BY judged.ordinal
