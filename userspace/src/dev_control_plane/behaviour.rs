//! How the control plane misbehaves when it is told to: what agents must survive, for tests. Read from a file by `run`, which follows it as it
//! changes; the faults themselves are committed by `distort`, `xds` and `ca`.
//!
//! ```yaml
//! xds: [{delay-ms: 200}, {garbage: cluster//Pod/shop/web}]
//! ca: [expired]
//! ```

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// How often the file is looked at.
const EVERY: Duration = Duration::from_millis(50);
const MOST_BYTES: u64 = 64 * 1024;

/// All that it does wrong. The default is nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Behaviour {
    /// Of the xDS service.
    #[serde(default)]
    pub xds: Vec<XdsFault>,
    /// Of the certificate authority.
    #[serde(default)]
    pub ca: Vec<CaFault>,
}

/// What the xDS service does wrong. Resources are given by name; one that there is not is reported in the log.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum XdsFault {
    /// Streams are accepted, and then nothing is heard of them.
    Stall,
    /// A stream breaks off after so many responses.
    ResetAfter(u32),
    /// Each response comes so late, in milliseconds.
    DelayMs(u64),
    /// Responses are for a type that nobody asked for.
    WrongResponseType,
    /// All resources have the same version, whatever they say.
    WrongVersion,
    /// This resource consists of bytes that are no message.
    Garbage(String),
    /// This resource claims a field of 4 GiB that is not there.
    AbsurdLength(String),
    /// This resource has an address of 17 bytes, a prefix or port beyond all bounds.
    AbsurdValues(String),
    /// This resource has a value in an enumeration that nobody knows.
    UnknownEnum(String),
    /// This resource is of another type than the response.
    WrongType(String),
    /// There is a second workload with the addresses of this one.
    SharedAddress(String),
}

/// What the certificate authority does wrong.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaFault {
    /// Nobody gets a certificate: PERMISSION_DENIED.
    Refuse,
    /// Each answer comes so late, in milliseconds.
    DelayMs(u64),
    /// The certificate is for somebody else.
    OtherIdentity,
    /// The certificate expired an hour ago.
    Expired,
    /// Certificate and root are of a CA that nobody else knows.
    OtherRoot,
    /// The root is missing from the chain.
    LeafOnly,
    /// The root is one that did not sign the certificate.
    UnrelatedRoot,
    /// The root of the next CA comes along. There is one such CA for as long as the control plane runs.
    BothRoots,
    /// For these service accounts, or for all if none is named: certificate and root are of the next CA alone.
    NextRoot(Vec<String>),
    /// Nothing wrong, and yet unusual here: certificates are of a CA below the root. There is one for as long as the control plane runs.
    Intermediate,
}

/// Why a behaviour is not in effect.
#[derive(Debug, thiserror::Error)]
pub enum BehaviourError {
    /// The file cannot be read.
    #[error("cannot read the behaviour file {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// It is not one.
    #[error("the behaviour file {} is not one: {reason}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl Behaviour {
    /// Reads a file. One that does not exist, or says nothing, asks for no faults.
    ///
    /// # Errors
    /// See [`BehaviourError`].
    pub fn load(path: &Path) -> Result<Self, BehaviourError> {
        Self::parse(path, &read(path)?)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, BehaviourError> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        serde_saphyr::from_str(text).map_err(|error| BehaviourError::Text {
            path: path.to_owned(),
            reason: error.without_snippet().to_string(),
        })
    }

    /// True if streams are to be left without an answer.
    pub fn stalls(&self) -> bool {
        self.xds.contains(&XdsFault::Stall)
    }

    /// After how many responses a stream breaks off.
    pub fn reset_after(&self) -> Option<u32> {
        self.xds.iter().find_map(|fault| match fault {
            XdsFault::ResetAfter(responses) => Some(*responses),
            _ => None,
        })
    }

    /// By how much responses of xDS are late.
    pub fn xds_delay(&self) -> Option<Duration> {
        self.xds.iter().find_map(|fault| match fault {
            XdsFault::DelayMs(milliseconds) => Some(Duration::from_millis(*milliseconds)),
            _ => None,
        })
    }

    /// By how much certificates are late.
    pub fn ca_delay(&self) -> Option<Duration> {
        self.ca.iter().find_map(|fault| match fault {
            CaFault::DelayMs(milliseconds) => Some(Duration::from_millis(*milliseconds)),
            _ => None,
        })
    }
}

/// Keeps `behaviour` at what the file says, if there is to be one, until `shutdown`. A file that is no such file is reported once,
/// and the behaviour stays.
pub async fn follow(
    path: Option<PathBuf>,
    behaviour: watch::Sender<Arc<Behaviour>>,
    shutdown: CancellationToken,
) {
    let Some(path) = path else {
        return shutdown.cancelled().await;
    };
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reported = String::new();
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        // A small file, most likely in memory: not worth another thread.
        match Behaviour::load(&path) {
            Ok(new) => {
                reported.clear();
                behaviour.send_if_modified(|known| {
                    let differs = **known != new;
                    if differs {
                        tracing::info!(behaviour = ?new, "another behaviour is in effect");
                        *known = Arc::new(new);
                    }
                    differs
                });
            }
            Err(error) => {
                let text = error.to_string();
                if text != reported {
                    tracing::error!(%error, "the behaviour stays as it was");
                    reported = text;
                }
            }
        }
    }
}

fn read(path: &Path) -> Result<String, BehaviourError> {
    let mut text = String::new();
    let outcome = File::open(path).and_then(|file| file.take(MOST_BYTES).read_to_string(&mut text));
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(text),
        Err(error) => Err(BehaviourError::Read {
            path: path.to_owned(),
            error,
        }),
        Ok(_) => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_by_name_and_nothing_else_is() {
        let parse = |text| Behaviour::parse(Path::new("behaviour.yaml"), text);
        assert_eq!(parse(" \n").unwrap(), Behaviour::default());
        let text = "xds:\n  - stall\n  - reset-after: 3\n  - {garbage: a//b/c}\nca: [expired, {delay-ms: 5}, {next-root: [web]}]\n";
        let expected = Behaviour {
            xds: vec![
                XdsFault::Stall,
                XdsFault::ResetAfter(3),
                XdsFault::Garbage("a//b/c".to_owned()),
            ],
            ca: vec![
                CaFault::Expired,
                CaFault::DelayMs(5),
                CaFault::NextRoot(vec!["web".to_owned()]),
            ],
        };
        assert_eq!(parse(text).unwrap(), expected);
        assert!(expected.stalls());
        assert_eq!(expected.reset_after(), Some(3));
        assert_eq!(expected.xds_delay(), None);
        assert_eq!(expected.ca_delay(), Some(Duration::from_millis(5)));
        for wrong in [
            "xdss: [stall]",
            "xds: [stal]",
            "xds: stall",
            "xds: [garbage]",
        ] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("behaviour.yaml"), "{error}");
        }
    }

    #[test]
    fn without_a_file_it_behaves() {
        let directory = tempfile::tempdir().unwrap();
        let behaviour = Behaviour::load(&directory.path().join("none")).unwrap();
        assert_eq!(behaviour, Behaviour::default());
    }
}
