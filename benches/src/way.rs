//! The ways a connection between two pods of one node can take, each on a node of its own.

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Without an agent on the node.
    Plain,
    /// Direct: the kernel part admits, nothing else is between the applications.
    Direct,
    /// Direct, and short-circuited where both programs' sockets do not block.
    Short,
    /// Through the agent: HBONE from the client's pod to the server's.
    Proxy,
    /// Direct, without flow telemetry.
    Untold,
    /// Direct, with the access log.
    Logged,
    /// Direct, in a mesh of 10,000 workloads.
    Big,
    /// No agent, but a routing rule as an agent makes one.
    Ruled,
    /// Every hook is there and leaves every connection alone.
    Idle,
}

impl Way {
    pub const ALL: [Self; 9] = [
        Self::Plain,
        Self::Direct,
        Self::Short,
        Self::Proxy,
        Self::Untold,
        Self::Logged,
        Self::Big,
        Self::Ruled,
        Self::Idle,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Direct => "direct",
            Self::Short => "short-circuit",
            Self::Proxy => "proxy",
            Self::Untold => "telemetry off",
            Self::Logged => "access log on",
            Self::Big => "big mesh",
            Self::Ruled => "routing rule",
            Self::Idle => "idle hooks",
        }
    }

    /// Whether an agent serves its node.
    pub fn is_meshed(self) -> bool {
        !matches!(self, Self::Plain | Self::Ruled)
    }

    /// Whether the agent, or the kernel part, decides its connections.
    pub fn is_decided(self) -> bool {
        self.is_meshed() && self != Self::Idle
    }
}
