//! The data set. Ids are computed from numbers, so that pgbench and the load client can pick rows at random.

use anyhow::Context;
use issue_tracker::postgres::Cluster;
use tokio_postgres::NoTls;
use uuid::Uuid;

pub const USERS: u32 = 1_000;
pub const LABELS: u32 = 50;
pub const COMMENTS_PER_ISSUE: usize = 3;
pub const LABELS_PER_ISSUE: usize = 2;
/// SQL expressions that compute the id of a user, label or issue from its number `N`.
pub const USER_ID_SQL: &str = "('0180' || lpad(to_hex(N), 8, '0') || '70008000000000000000')::uuid";
pub const LABEL_ID_SQL: &str = "('0181' || lpad(to_hex(N), 8, '0') || '70008000000000000000')::uuid";
pub const ISSUE_ID_SQL: &str = "('0190' || lpad(to_hex(N), 8, '0') || '70008000000000000000')::uuid";

/// Computes the same id as `USER_ID_SQL`.
pub fn user_id(number: u32) -> Uuid {
    id(0x0180, number)
}

/// Computes the same id as `LABEL_ID_SQL`.
pub fn label_id(number: u32) -> Uuid {
    id(0x0181, number)
}

/// Computes the same id as `ISSUE_ID_SQL`.
pub fn issue_id(number: u32) -> Uuid {
    id(0x0190, number)
}

fn id(prefix: u128, number: u32) -> Uuid {
    Uuid::from_u128(prefix << 112 | u128::from(number) << 80 | 0x7000 << 64 | 0x8000_0000_0000_0000)
}

/// Inserts the data set into a database that has the schema and one user.
pub fn load(cluster: &Cluster, database: &str, issues: u32) -> anyhow::Result<()> {
    let sql = |template: &str| {
        template
            .replace("USER_ID(u)", &USER_ID_SQL.replace('N', "u"))
            .replace("USER_ID(1 + n % 1000)", &USER_ID_SQL.replace('N', "1 + n % 1000"))
            .replace("USER_ID(1 + n % 997)", &USER_ID_SQL.replace('N', "1 + n % 997"))
            .replace("LABEL_ID(l)", &LABEL_ID_SQL.replace('N', "l"))
            .replace("ISSUE_ID(n)", &ISSUE_ID_SQL.replace('N', "n"))
            .replace("USERS", &USERS.to_string())
            .replace("LABELS", &LABELS.to_string())
            .replace("ISSUES", &issues.to_string())
    };
    let statements = [
        "INSERT INTO users (id, username, role, password_hash) SELECT USER_ID(u), 'user' || u, 2, '' FROM generate_series(1, USERS) u",
        "INSERT INTO labels (id, name) SELECT LABEL_ID(l), 'label ' || l FROM generate_series(1, LABELS) l",
        "INSERT INTO issues (id, reporter_id, assignee_id, status, priority, title, description, create_time, update_time, close_time)
         SELECT ISSUE_ID(n), USER_ID(1 + n % 1000), CASE WHEN n % 4 > 0 THEN USER_ID(1 + n % 997) END, 1 + n % 3, n % 5,
            'Issue number ' || n, repeat('what happens and how to see it ', 1 + n % 8), t, t,
            CASE WHEN n % 3 = 2 THEN t + make_interval(hours => n % 500) END
         FROM (SELECT n, timestamptz '2024-01-01' + n * interval '10 seconds' AS t FROM generate_series(1, ISSUES) n) n",
        "INSERT INTO issue_labels SELECT ISSUE_ID(n), LABEL_ID(l)
         FROM generate_series(1, ISSUES) n, LATERAL (VALUES (1 + n % LABELS), (1 + (n + 7) % LABELS)) AS v (l)",
        "INSERT INTO comments (id, issue_id, author_id, content)
         SELECT ('0191' || lpad(to_hex(n), 8, '0') || '7' || lpad(to_hex(c), 3, '0') || '8000000000000000')::uuid,
            ISSUE_ID(n), USER_ID(1 + n % 1000), 'comment ' || c || ' on what was seen and what may help'
         FROM generate_series(1, ISSUES) n, generate_series(1, 3) c",
        "VACUUM ANALYZE",
        "CHECKPOINT",
    ];
    let config = cluster.connect_config(database);
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        for statement in statements {
            client.batch_execute(&sql(statement)).await.with_context(|| statement.to_owned())?;
        }
        Ok(())
    })
}
