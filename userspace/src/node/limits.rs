//! Limits of the process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Each connection through the agent takes two descriptors: use all that the system grants.
pub fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
