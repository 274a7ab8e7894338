//! One connection, as telemetry sees it. Written once when it ends (or is refused), partly known when it opens.
//! The serialised form is what `culvert flows --json` prints: names there are stable.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use culvert_abi::Reason;

use crate::policy::Identity;

/// What is known of one end of a connection. Shared: one per workload, not one per connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Party {
    /// The pod's name; `src.workload` in the access log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The name of what made the pod (a deployment, say); the `source_workload` label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload_name: Option<String>,
    /// Namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Verified identity; none for a party outside the mesh.
    #[serde(with = "identity_text", skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    /// Canonical service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canonical_service: Option<String>,
    /// Canonical revision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canonical_revision: Option<String>,
    /// Application.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app: Option<String>,
    /// Version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
}

/// The service a client addressed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServiceName {
    /// Host name.
    pub hostname: String,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
}

/// Which way the connection goes, seen from the pod it is reported for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The pod accepted it.
    Inbound,
    /// The pod opened it.
    #[default]
    Outbound,
}

/// Which end reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reporter {
    /// The client's side.
    #[default]
    Source,
    /// The server's side.
    Destination,
}

/// The way the bytes took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowPath {
    /// Admitted by the kernel, no proxy between.
    Direct,
    /// Through a tunnel.
    Hbone,
    /// Relayed as it came.
    #[default]
    Plaintext,
}

macro_rules! ends {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal;)*) => {
        /// How a connection ended, or why it was never established.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum FlowEnd { $($(#[doc = $doc])+ #[serde(rename = $name)] $variant,)* }

        impl FlowEnd {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// As it appears in labels and logs.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// One sentence for the metrics reference.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+)),* }
            }
        }
    };
}
ends! {
    /// Both sides closed in order.
    Fin = "fin";
    /// The client reset it: it closed without reading everything, without lingering, or was killed.
    ResetByClient = "reset_by_client";
    /// The server reset it.
    ResetByPeer = "reset_by_peer";
    /// The other side did not answer any more, or never.
    Timeout = "timeout";
    /// Policy came to forbid it, or the certificate at its tunnel's other end was revoked, and the agent cut it.
    Revoked = "revoked";
    /// Somebody else than the agent destroyed the socket.
    Destroyed = "destroyed";
    /// Nobody listens.
    Refused = "refused";
    /// The network said that the other side cannot be reached.
    Unreachable = "unreachable";
    /// Policy refused it.
    Denied = "denied";
    /// It could not be carried for another reason; the log line's error says which.
    Failed = "failed";
    /// The agent or the pod stopped.
    Stopped = "stopped";
    /// Not known: its report was lost.
    Unknown = "unknown";
    /// It was short-circuited, its reader could not see what was sent, and the agent reset it.
    Stuck = "stuck";
}

/// Why a connection failed, in the short form of the `response_flags` label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ResponseFlags {
    /// It did not.
    #[default]
    #[serde(rename = "-")]
    None,
    /// Policy refused it, or cut it later.
    #[serde(rename = "DENY")]
    Deny,
    /// The destination could not be reached.
    #[serde(rename = "CONNECT")]
    Connect,
    /// The TLS handshake failed.
    #[serde(rename = "TLS_FAILURE")]
    TlsFailure,
    /// The HTTP/2 handshake failed.
    #[serde(rename = "H2_HANDSHAKE_FAILURE")]
    Http2Failure,
    /// There is no valid certificate for the pod.
    #[serde(rename = "IDENTITY_ERROR")]
    IdentityFailure,
}

/// The `connection_security_policy` label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Security {
    /// Both identities were verified: by TLS, or by the kernel for a direct flow (which is not encrypted).
    MutualTls,
    /// Nothing was verified.
    #[default]
    Unknown,
}

macro_rules! text {
    ($type:ident { $($variant:ident = $text:literal),* }) => {
        impl $type {
            /// As it appears in labels and logs.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }
    };
}
text!(Direction { Inbound = "inbound", Outbound = "outbound" });
text!(Reporter { Source = "source", Destination = "destination" });
text!(FlowPath { Direct = "direct", Hbone = "hbone", Plaintext = "plaintext" });
text!(Security { MutualTls = "mutual_tls", Unknown = "unknown" });
text!(ResponseFlags {
    None = "-", Deny = "DENY", Connect = "CONNECT", TlsFailure = "TLS_FAILURE",
    Http2Failure = "H2_HANDSHAKE_FAILURE", IdentityFailure = "IDENTITY_ERROR"
});

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowRecord {
    /// The client's address.
    pub source_addr: SocketAddr,
    /// The client.
    #[serde(with = "shared")]
    pub source: Arc<Party>,
    /// The address connected to; for a tunnel the tunnel's (`ip:15008`).
    pub destination_addr: SocketAddr,
    /// For a tunnel, the address asked for inside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hbone_addr: Option<SocketAddr>,
    /// The service addressed, if one was.
    #[serde(
        default,
        with = "shared_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub service: Option<Arc<ServiceName>>,
    /// The server.
    #[serde(with = "shared")]
    pub destination: Arc<Party>,
    /// Seen from the reporting pod.
    pub direction: Direction,
    /// The end that reports.
    pub reporter: Reporter,
    /// The way the bytes took.
    pub path: FlowPath,
    /// Why it is not direct, where the kernel part gave it to the agent: a reason of `culvert_kernel_decisions_total`.
    #[serde(default, with = "reason_name", skip_serializing_if = "Option::is_none")]
    pub not_direct: Option<Reason>,
    /// Bytes from server to client, whoever reports: Istio's "sent during response".
    pub bytes_sent: u64,
    /// Bytes from client to server, whoever reports: Istio's "received during request".
    pub bytes_received: u64,
    /// From open to end.
    #[serde(rename = "duration_us", with = "micros")]
    pub duration: Duration,
    /// How it ended; none while it is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<FlowEnd>,
    /// From SYN to establishment, where the kernel measured it.
    #[serde(
        rename = "connect_latency_us",
        default,
        with = "micros_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub connect_latency: Option<Duration>,
    /// Smoothed round-trip time, where the kernel measured one.
    #[serde(
        rename = "rtt_us",
        default,
        with = "micros_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub rtt: Option<Duration>,
    /// Segments sent again, where the kernel counted them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retransmits: Option<u32>,
    /// Direct connections: `yes` if it was short-circuited, else why not. The words are in docs/FLOWS.md.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_circuit: Option<Cow<'static, str>>,
    /// Those of `bytes_sent` that went past TCP, if it was short-circuited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirected_sent: Option<u64>,
    /// Those of `bytes_received`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirected_received: Option<u64>,
    /// The policy that decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Why it failed; none for a connection that ended as its ends wished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The same as a label.
    pub response_flags: ResponseFlags,
    /// How the ends were verified.
    pub security: Security,
}

impl FlowPath {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Direct, Self::Hbone, Self::Plaintext];
}

impl FlowRecord {
    /// What `short_circuit` says where nobody asked for it.
    pub const NOT_SHORT_CIRCUITED: &str = "off";

    /// What `short_circuit` says, where it is worth a word in a line.
    pub fn short_circuit_word(&self) -> Option<&str> {
        let word = self.short_circuit.as_deref();
        word.filter(|word| *word != Self::NOT_SHORT_CIRCUITED)
    }

    /// A connection of which only the addresses are known.
    pub fn new(source_addr: SocketAddr, destination_addr: SocketAddr) -> Self {
        Self {
            source_addr,
            source: Arc::default(),
            destination_addr,
            hbone_addr: None,
            service: None,
            destination: Arc::default(),
            direction: Direction::default(),
            reporter: Reporter::default(),
            path: FlowPath::default(),
            not_direct: None,
            bytes_sent: 0,
            bytes_received: 0,
            duration: Duration::ZERO,
            end: None,
            connect_latency: None,
            rtt: None,
            retransmits: None,
            short_circuit: None,
            redirected_sent: None,
            redirected_received: None,
            policy: None,
            error: None,
            response_flags: ResponseFlags::default(),
            security: Security::default(),
        }
    }
}

impl Default for FlowRecord {
    fn default() -> Self {
        let nowhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        Self::new(nowhere, nowhere)
    }
}

mod identity_text {
    use super::*;

    pub fn serialize<S: Serializer>(id: &Option<Identity>, to: S) -> Result<S::Ok, S::Error> {
        id.as_ref().map(ToString::to_string).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Identity>, D::Error> {
        Option::<String>::deserialize(from)?
            .map(|text| Identity::parse(&text).map_err(serde::de::Error::custom))
            .transpose()
    }
}

mod reason_name {
    use super::*;

    pub fn serialize<S: Serializer>(reason: &Option<Reason>, to: S) -> Result<S::Ok, S::Error> {
        reason.map(Reason::name).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Reason>, D::Error> {
        let named = |name: String| {
            let mut all = Reason::ALL.into_iter();
            all.find(|reason| reason.name() == name)
                .ok_or_else(|| serde::de::Error::custom(format!("{name:?} is not a reason")))
        };
        Option::<String>::deserialize(from)?.map(named).transpose()
    }
}

mod shared {
    use super::*;

    pub fn serialize<S: Serializer, T: Serialize>(
        value: &Arc<T>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        value.as_ref().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
        from: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(from).map(Arc::new)
    }
}

mod shared_option {
    use super::*;

    pub fn serialize<S: Serializer, T: Serialize>(
        value: &Option<Arc<T>>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        value.as_deref().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
        from: D,
    ) -> Result<Option<Arc<T>>, D::Error> {
        Ok(Option::<T>::deserialize(from)?.map(Arc::new))
    }
}

mod micros {
    use super::*;

    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        u64::try_from(value.as_micros())
            .unwrap_or(u64::MAX)
            .serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_micros)
    }
}

mod micros_option {
    use super::*;

    pub fn serialize<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
        let micros = value.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX));
        micros.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(Duration::from_micros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serialised_form_reads_back_the_same() {
        let full = FlowRecord {
            source: Arc::new(Party {
                name: Some("client-1".into()),
                identity: Some(Identity::parse("spiffe://cluster.local/ns/a/sa/b").unwrap()),
                ..Party::default()
            }),
            hbone_addr: Some("10.0.0.2:80".parse().unwrap()),
            service: Some(Arc::new(ServiceName::default())),
            duration: Duration::from_micros(1234),
            end: Some(FlowEnd::ResetByPeer),
            connect_latency: Some(Duration::from_micros(90)),
            rtt: Some(Duration::from_micros(70)),
            retransmits: Some(1),
            short_circuit: Some("yes".into()),
            redirected_sent: Some(5),
            redirected_received: Some(0),
            policy: Some("ns/p".into()),
            not_direct: Some(Reason::SteeredRemote),
            error: Some("x\n\"".into()),
            response_flags: ResponseFlags::TlsFailure,
            ..FlowRecord::default()
        };
        for record in [full, FlowRecord::default()] {
            let text = serde_json::to_string(&record).unwrap();
            assert_eq!(
                serde_json::from_str::<FlowRecord>(&text).unwrap(),
                record,
                "{text}"
            );
        }
    }
}
