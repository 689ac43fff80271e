//! An external database server, as opposed to the one that the service embeds.

use issue_tracker::postgres::{Cluster, Durability};
use tokio_postgres::Config;

use super::process::Dir;

pub struct External {
    /// Declared before the directory that contains it, so that it is dropped first.
    pub cluster: Cluster,
    pub dir: Dir,
}

impl External {
    pub fn start(durability: Durability) -> Self {
        let dir = Dir::new();
        let cluster = Cluster::start(&dir.path("external"), durability).unwrap();
        Self { cluster, dir }
    }

    pub fn config(&self) -> Config {
        self.cluster.connect_config("postgres")
    }

    /// Returns the connection string for `--database-url`.
    pub fn url(&self) -> String {
        format!("host={} user=postgres dbname=postgres", self.cluster.socket_dir().display())
    }
}
