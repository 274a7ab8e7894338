//! The messages: from bytes to what they ask for, and back to an answer. No I/O.

use prost::Message as _;

use super::ZdsError;
use crate::{
    enrol::PodUid,
    wire::istio::workload::zds::{
        Ack, AddWorkload, Version, WorkloadRequest, WorkloadResponse, ZdsHello,
        workload_request::Payload as Asked, workload_response::Payload as Answered,
    },
};

/// No message is longer, in either direction.
pub const MOST_BYTES: usize = 1024;
/// What an answer may say, so that the whole of it fits.
const MOST_TEXT: usize = MOST_BYTES - 64;

/// What a message asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Add(AddedPod),
    /// This pod is still one of the mesh's, but there is nothing new to say of it.
    Keep(PodUid),
    Del(PodUid),
    /// What was not named by now is not there.
    SnapshotSent,
}

/// A pod to enrol. What istio-cni leaves out is `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedPod {
    pub uid: PodUid,
    pub name: Option<String>,
    pub namespace: Option<String>,
    pub service_account: Option<String>,
}

impl Request {
    /// Reads a message that came with so many descriptors.
    pub fn decode(bytes: &[u8], descriptors: usize) -> Result<Self, ZdsError> {
        let message = WorkloadRequest::decode(bytes)?;
        let request = match message.payload.ok_or(ZdsError::Unknown)? {
            Asked::Add(add) => Self::Add(AddedPod::of(add)?),
            Asked::Keep(keep) => Self::Keep(uid(&keep.uid)?),
            Asked::Del(del) => Self::Del(uid(&del.uid)?),
            Asked::SnapshotSent(_) => Self::SnapshotSent,
        };
        let (what, expected) = match request {
            Self::Add(_) => ("AddWorkload", 1),
            Self::Keep(_) => ("KeepWorkload", 0),
            Self::Del(_) => ("DelWorkload", 0),
            Self::SnapshotSent => ("SnapshotSent", 0),
        };
        if descriptors == expected {
            Ok(request)
        } else {
            Err(ZdsError::Descriptors {
                what,
                expected,
                found: descriptors,
            })
        }
    }
}

impl AddedPod {
    fn of(add: AddWorkload) -> Result<Self, ZdsError> {
        let info = add.workload_info.unwrap_or_default();
        let said = |text: String| (!text.is_empty()).then_some(text);
        Ok(Self {
            uid: uid(&add.uid)?,
            name: said(info.name),
            namespace: said(info.namespace),
            service_account: said(info.service_account),
        })
    }
}

fn uid(text: &str) -> Result<PodUid, ZdsError> {
    PodUid::new(text).map_err(|_| ZdsError::Uid)
}

/// The agent's first message.
pub fn hello() -> Vec<u8> {
    let version = Version::V1.into();
    ZdsHello { version }.encode_to_vec()
}

/// The answer to a message: it was done, or why not.
pub fn answer(outcome: Result<(), &str>) -> Vec<u8> {
    let mut error = outcome.err().unwrap_or_default().to_owned();
    error.truncate(error.floor_char_boundary(MOST_TEXT));
    let ack = Answered::Ack(Ack { error });
    let response = WorkloadResponse { payload: Some(ack) };
    response.encode_to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::istio::workload::zds::{
        DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo,
    };

    fn encoded(payload: Asked) -> Vec<u8> {
        let payload = Some(payload);
        WorkloadRequest { payload }.encode_to_vec()
    }

    fn add(uid: &str) -> Vec<u8> {
        encoded(Asked::Add(AddWorkload {
            uid: uid.to_owned(),
            workload_info: Some(WorkloadInfo {
                name: "web".to_owned(),
                namespace: "shop".to_owned(),
                service_account: String::new(),
            }),
        }))
    }

    #[test]
    fn each_message_has_the_number_of_descriptors_that_is_its_own() {
        let uid = "7d1f-a".to_owned();
        let messages = [
            (add(&uid), 1),
            (encoded(Asked::Keep(KeepWorkload { uid: uid.clone() })), 0),
            (encoded(Asked::Del(DelWorkload { uid })), 0),
            (encoded(Asked::SnapshotSent(SnapshotSent {})), 0),
        ];
        for (message, expected) in messages {
            for descriptors in 0..4 {
                let decoded = Request::decode(&message, descriptors);
                assert_eq!(decoded.is_ok(), descriptors == expected, "{decoded:?}");
            }
        }
    }

    #[test]
    fn what_is_left_out_is_not_an_empty_name() {
        let Request::Add(pod) = Request::decode(&add("a"), 1).unwrap() else {
            panic!("another message");
        };
        assert_eq!(pod.namespace.as_deref(), Some("shop"));
        assert_eq!(pod.service_account, None);
    }

    #[test]
    fn a_uid_that_is_none_is_refused() {
        for uid in ["", "a b", "a\n", &"a".repeat(254)] {
            assert!(
                matches!(Request::decode(&add(uid), 1), Err(ZdsError::Uid)),
                "{uid:?}"
            );
        }
    }

    #[test]
    fn an_answer_fits_whatever_it_says() {
        for text in ["", "no", &"long ".repeat(1000), &"ü".repeat(1000)] {
            let bytes = answer(Err(text));
            assert!(bytes.len() <= MOST_BYTES);
            let Some(Answered::Ack(ack)) = WorkloadResponse::decode(&bytes[..]).unwrap().payload
            else {
                panic!("no answer");
            };
            assert!(text.starts_with(&ack.error));
        }
        assert_eq!(answer(Ok(())), answer(Err("")), "no text is an ACK");
    }

    proptest! {
        #[test]
        fn no_bytes_end_the_agent(bytes in proptest::collection::vec(any::<u8>(), 0..MOST_BYTES), descriptors in 0..4_usize) {
            let _ = Request::decode(&bytes, descriptors);
        }
    }
}
