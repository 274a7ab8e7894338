//! Which pods were enrolled, so that a new agent serves those of an operator without being told again, and leaves what an earlier
//! one set up for those of istio-cni in force until istio-cni has named its pods anew.
//!
//! The file lies beside the admin socket, in a directory only root can write, and on a file system that does not outlive the
//! kernel's namespaces. A pod is taken back only if its path still leads to the namespace with the remembered cookie: a process
//! id, and so a path below /proc, may have come to mean another namespace. Of what istio-cni handed over there is no path: whether
//! that namespace is still there only istio-cni can say. A pod keeps the addresses it was enrolled with: what
//! is configured in its namespace by now is the pod's own doing.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{NetnsPlace, Origin, PodSpec, PodUid};
use crate::kernel::{CniRules, Netns, NetnsCookie};

/// More than any node has; a larger file is not ours.
const MOST_BYTES: u64 = 16 << 20;

/// The file of enrolled pods.
#[derive(Debug)]
pub struct Memory {
    path: PathBuf,
}

/// A pod that was enrolled, by an earlier agent perhaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPod {
    pub spec: PodSpec,
    pub cookie: NetnsCookie,
    /// It was released, and only connections from before went on through the agent.
    pub leaves: bool,
    /// The primary one first.
    pub ips: Vec<IpAddr>,
    /// What its routing replaced (`kernel::PodRouting::previous`).
    pub replaced: Vec<String>,
    /// What was taken over from istio-cni.
    pub taken: CniRules,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    uid: String,
    origin: Origin,
    /// None where there was none.
    netns: Option<PathBuf>,
    netns_inode: u64,
    netns_cookie: u64,
    leaves: bool,
    ips: Vec<IpAddr>,
    replaced: Vec<String>,
    taken: CniRules,
    namespace: Option<String>,
    name: Option<String>,
    service_account: Option<String>,
}

impl Memory {
    /// The memory beside an admin socket.
    pub fn beside(admin_socket: &Path) -> Self {
        Self {
            path: admin_socket.with_extension("pods.json"),
        }
    }

    /// The pods to take back. What cannot be read or has gone is left out and said.
    pub fn recall(&self) -> Vec<KnownPod> {
        let remembered = match self.read() {
            Ok(remembered) => remembered,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::warn!(file = %self.path.display(), %error, "the list of enrolled pods cannot be read; enrol them again");
                return Vec::new();
            }
        };
        remembered
            .into_iter()
            .filter_map(Remembered::verified)
            .collect()
    }

    /// Remembers exactly these pods.
    pub fn store<'a>(&self, pods: impl IntoIterator<Item = &'a KnownPod>) {
        let remembered: Vec<_> = pods.into_iter().map(Remembered::of).collect();
        let new = self.path.with_extension("json.new");
        let written = serde_json::to_vec_pretty(&remembered)
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, &self.path));
        if let Err(error) = written {
            tracing::warn!(file = %self.path.display(), %error, "enrolled pods cannot be remembered; after a restart they must be enrolled again");
        }
    }

    fn read(&self) -> io::Result<Vec<Remembered>> {
        if fs::metadata(&self.path)?.len() > MOST_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file is too large",
            ));
        }
        Ok(serde_json::from_slice(&fs::read(&self.path)?)?)
    }
}

impl Remembered {
    fn of(pod: &KnownPod) -> Self {
        let (netns, netns_inode) = match pod.spec.netns.remembered() {
            NetnsPlace::Path(path) => (Some(path), 0),
            NetnsPlace::Remembered { inode, .. } => (None, inode),
            NetnsPlace::Held(netns) => (None, netns.inode()),
        };
        Self {
            uid: pod.spec.uid.to_string(),
            origin: pod.spec.origin,
            netns,
            netns_inode,
            netns_cookie: pod.cookie.0,
            leaves: pod.leaves,
            ips: pod.ips.clone(),
            replaced: pod.replaced.clone(),
            taken: pod.taken.clone(),
            namespace: pod.spec.namespace.clone(),
            name: pod.spec.name.clone(),
            service_account: pod.spec.service_account.clone(),
        }
    }

    fn verified(self) -> Option<KnownPod> {
        let cookie = NetnsCookie(self.netns_cookie);
        let netns = match self.netns {
            Some(path) => {
                if !Netns::open(&path).is_ok_and(|netns| netns.cookie() == cookie) {
                    tracing::info!(pod = %self.uid, netns = %path.display(), "a pod that was enrolled before has gone");
                    return None;
                }
                NetnsPlace::Path(path)
            }
            None => NetnsPlace::Remembered {
                inode: self.netns_inode,
                cookie,
            },
        };
        let spec = PodSpec {
            uid: PodUid::new(&self.uid).ok()?,
            netns,
            origin: self.origin,
            namespace: self.namespace,
            name: self.name,
            service_account: self.service_account,
        };
        Some(KnownPod {
            spec,
            cookie,
            leaves: self.leaves,
            ips: self.ips,
            replaced: self.replaced,
            taken: self.taken,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_or_foreign_file_recalls_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Memory::beside(&directory.path().join("admin.sock"));
        assert_eq!(memory.recall(), []);
        for text in ["", "{", "[1]", r#"[{"uid":"a"}]"#, "\0\0"] {
            fs::write(&memory.path, text).unwrap();
            assert_eq!(memory.recall(), [], "{text:?}");
        }
    }

    #[test]
    fn a_path_that_leads_elsewhere_by_now_is_not_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Memory::beside(&directory.path().join("admin.sock"));
        let pod = |cookie: u64, netns: &str| serde_json::json!({"uid": "a", "origin": "operator", "netns": netns, "netns_inode": 0, "netns_cookie": cookie, "leaves": false, "ips": ["10.0.0.1", "fd00::1"], "replaced": ["0", "0"], "taken": CniRules::default(), "namespace": null, "name": null, "service_account": null});
        let own = "/proc/self/ns/net";
        let cookie = Netns::open(Path::new(own)).unwrap().cookie().0;
        let pods = serde_json::json!([
            pod(cookie, own),
            pod(cookie + 1, own),
            pod(cookie, "/proc/self/status"),
            pod(1, "/no/such")
        ]);
        fs::write(&memory.path, pods.to_string()).unwrap();
        assert_eq!(memory.recall().len(), 1);
    }

    #[test]
    fn what_istio_cni_handed_over_is_remembered_by_its_numbers() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Memory::beside(&directory.path().join("admin.sock"));
        let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        let (inode, cookie) = (netns.inode(), netns.cookie());
        let pod = KnownPod {
            spec: PodSpec {
                uid: PodUid::new("a").unwrap(),
                netns: NetnsPlace::Held(netns.into()),
                origin: Origin::Cni,
                namespace: None,
                name: None,
                service_account: None,
            },
            cookie,
            leaves: false,
            ips: vec![],
            replaced: vec![],
            taken: CniRules::default(),
        };
        memory.store([&pod]);
        assert_eq!(memory.recall(), [pod]);
        assert!(
            matches!(memory.recall().remove(0).spec.netns, NetnsPlace::Remembered { inode: found, .. } if found == inode)
        );
    }
}
