//! A database server that is not the service's own.

use issue_tracker::postgres::{Cluster, Durability};
use tokio_postgres::Config;

use super::process::Dir;

pub struct External {
    /// Before the directory that it is in.
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

    /// As the command line takes it.
    pub fn url(&self) -> String {
        format!("host={} user=postgres dbname=postgres", self.cluster.socket_dir().display())
    }
}
