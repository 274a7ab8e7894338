//! What a message means in the course of one connection. No I/O.

use std::collections::HashSet;

use super::{
    ZdsError,
    protocol::{AddedPod, Request},
};
use crate::enrol::PodUid;

/// Far more than one node has.
const MOST_PODS: usize = 1 << 16;

/// What is to be done for a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Enrol the pod, or have it stay; in another namespace than before it begins anew.
    Enrol(AddedPod),
    Release(PodUid),
    /// Release all pods of istio-cni's but these.
    KeepOnly(HashSet<PodUid>),
    Nothing,
}

/// One connection: a snapshot first, then changes.
#[derive(Debug)]
pub struct Session {
    /// Named so far; none when the snapshot is complete.
    named: Option<HashSet<PodUid>>,
}

impl Session {
    pub fn new() -> Self {
        Self {
            named: Some(HashSet::new()),
        }
    }

    /// Whether the snapshot is complete.
    pub fn is_synced(&self) -> bool {
        self.named.is_none()
    }

    /// Takes the next message. A pod counts as named also if it cannot be enrolled: it is on the node.
    pub fn take(&mut self, request: Request) -> Result<Action, ZdsError> {
        match request {
            Request::Add(pod) => {
                self.name(&pod.uid)?;
                Ok(Action::Enrol(pod))
            }
            Request::Keep(uid) => {
                self.name(&uid)?;
                Ok(Action::Nothing)
            }
            Request::Del(uid) => {
                if let Some(named) = &mut self.named {
                    named.remove(&uid);
                }
                Ok(Action::Release(uid))
            }
            // A second one has nothing to say: what came after the first were changes.
            Request::SnapshotSent => {
                Ok(self.named.take().map_or(Action::Nothing, Action::KeepOnly))
            }
        }
    }

    fn name(&mut self, uid: &PodUid) -> Result<(), ZdsError> {
        if let Some(named) = &mut self.named {
            if named.len() >= MOST_PODS {
                return Err(ZdsError::TooManyPods(MOST_PODS));
            }
            named.insert(uid.clone());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(text: &str) -> PodUid {
        PodUid::new(text).unwrap()
    }

    fn add(text: &str) -> Request {
        Request::Add(AddedPod {
            uid: uid(text),
            name: None,
            namespace: None,
            service_account: None,
        })
    }

    #[test]
    fn a_snapshot_keeps_what_it_added_or_kept_and_did_not_delete() {
        let mut session = Session::new();
        for request in [
            add("a"),
            Request::Keep(uid("b")),
            add("c"),
            Request::Del(uid("c")),
        ] {
            session.take(request).unwrap();
            assert!(!session.is_synced());
        }
        let action = session.take(Request::SnapshotSent).unwrap();
        assert_eq!(action, Action::KeepOnly([uid("a"), uid("b")].into()));
        assert!(session.is_synced());
    }

    #[test]
    fn an_empty_snapshot_says_that_there_are_no_pods() {
        let action = Session::new().take(Request::SnapshotSent).unwrap();
        assert_eq!(action, Action::KeepOnly(HashSet::new()));
    }

    #[test]
    fn after_the_snapshot_only_changes_count() {
        let mut session = Session::new();
        session.take(Request::SnapshotSent).unwrap();
        assert!(matches!(session.take(add("a")), Ok(Action::Enrol(_))));
        assert_eq!(
            session.take(Request::Keep(uid("b"))).unwrap(),
            Action::Nothing
        );
        assert_eq!(
            session.take(Request::SnapshotSent).unwrap(),
            Action::Nothing
        );
        assert_eq!(
            session.take(Request::Del(uid("a"))).unwrap(),
            Action::Release(uid("a"))
        );
    }
}
