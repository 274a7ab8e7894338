//! Cached policy decisions, written by the agent and read by `connect`.

/// Who asks whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub struct VerdictKey {
    /// Identity number or pod number, as [`VerdictKey::scope`] says.
    pub source: u32,
    /// Number of the destination workload.
    pub workload: u32,
    pub port: u16,
    pub scope: u16,
    pub padding: u32,
}

/// What [`VerdictKey::source`] counts.
pub mod scope {
    pub const IDENTITY: u16 = 0;
    /// The destination's policies look at addresses, so that the identity alone does not decide.
    pub const POD: u16 = 1;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Verdict {
    /// The destination's generation that this was evaluated under.
    pub generation: u64,
    pub action: u32,
    /// Number of the policy that decided, 0 when none did: the agent names it in the flow event.
    pub policy: u32,
}

pub mod action {
    /// Never allowed by accident: a zeroed value denies.
    pub const DENY: u32 = 0;
    pub const ALLOW: u32 = 1;
}
