//! The revocation lists of this node: followed where there is a file of them, and what is told of them.
//!
//! Started by `node`; `culvert status` and the metrics ask.

use std::{path::PathBuf, time::SystemTime};

use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    identity::{CrlFile, CrlFileError, CrlFileStatus, RevocationLists, Revocations},
    telemetry::{Metrics, RevocationCounters},
};

/// The lists, if there are to be any.
#[derive(Clone, Default)]
pub struct Crl {
    pub revocations: Revocations,
    file: Option<(PathBuf, watch::Receiver<CrlFileStatus>)>,
}

impl Crl {
    /// Reads the file, and follows it until `control`.
    ///
    /// # Errors
    /// It is of no use.
    pub fn start(
        config: &Config,
        control: &CancellationToken,
        tasks: &mut JoinSet<&'static str>,
    ) -> Result<Self, CrlFileError> {
        let Some(path) = &config.crl_path else {
            return Ok(Self::default());
        };
        let revocations = Revocations::new(RevocationLists::default());
        let (file, status) = CrlFile::open(path, revocations.clone())?;
        let control = control.clone();
        tasks.spawn(async move {
            file.run(control).await;
            "revocation lists"
        });
        Ok(Self {
            revocations,
            file: Some((path.clone(), status)),
        })
    }

    /// Lets metrics read them.
    pub fn count(&self, metrics: &Metrics) {
        if self.file.is_none() {
            return;
        }
        let revocations = self.revocations.clone();
        metrics.set_revocation_source(move || {
            let (lists, counts) = (revocations.current(), revocations.counts());
            RevocationCounters {
                peers: vec![("handshake", counts.refused), ("tunnel", counts.closed)],
                updates: vec![("accepted", counts.accepted), ("rejected", counts.rejected)],
                lists: lists.count() as u64,
                certificates: lists.certificates() as u64,
            }
        });
    }

    /// What is in force, in a line.
    pub fn describe(&self) -> Option<String> {
        let (path, _) = self.file.as_ref()?;
        let lists = self.revocations.current();
        Some(format!(
            "{} of {}, naming {} certificates",
            lists.count(),
            path.display(),
            lists.certificates()
        ))
    }

    /// What an operator should know.
    pub fn warnings(&self, now: SystemTime) -> Vec<String> {
        let Some((_, status)) = &self.file else {
            return Vec::new();
        };
        let lists = self.revocations.current();
        let overdue = lists.overdue(now).map(|issuer| {
            format!(
                "the revocation list of {issuer} is past its next update: it goes on to count, but what was revoked since is not known; put its successor into CRL_PATH"
            )
        });
        let status = status.borrow();
        let error = status.error.iter();
        error
            .map(|error| format!("revocation lists are not as in their file: {error}"))
            .chain(overdue)
            .collect()
    }
}
