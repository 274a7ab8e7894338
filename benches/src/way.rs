//! The ways a connection between two pods of one node can take, each on a node of its own.

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Without an agent on the node.
    Plain,
    /// Direct: the kernel part admits, nothing else is between the applications.
    Direct,
    /// Through the agent: HBONE from the client's pod to the server's.
    Proxy,
    /// Direct, without flow telemetry.
    Untold,
    /// Direct, with the access log.
    Logged,
    /// Direct, in a mesh of 10,000 workloads.
    Big,
}

impl Way {
    pub const ALL: [Self; 6] = [
        Self::Plain,
        Self::Direct,
        Self::Proxy,
        Self::Untold,
        Self::Logged,
        Self::Big,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Direct => "direct",
            Self::Proxy => "proxy",
            Self::Untold => "telemetry off",
            Self::Logged => "access log on",
            Self::Big => "big mesh",
        }
    }

    /// Whether an agent serves its node.
    pub fn is_meshed(self) -> bool {
        self != Self::Plain
    }
}
