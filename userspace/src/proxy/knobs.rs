//! Protections of the proxy that a test can switch off, to show that it would notice.

use super::tls;

/// All off unless the crate is built with the feature `test-knobs`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProxyKnobs {
    pub tls: tls::TestKnobs,
    /// Policy is not asked.
    #[cfg(feature = "test-knobs")]
    pub skip_policy: bool,
    /// A request may name any address and port.
    #[cfg(feature = "test-knobs")]
    pub skip_authority: bool,
    /// A request may name any address as the client's.
    #[cfg(feature = "test-knobs")]
    pub skip_forwarded_check: bool,
    /// Before there is a mesh, everything counts as outside of it.
    #[cfg(feature = "test-knobs")]
    pub skip_mesh_wait: bool,
    /// What the control plane was not asked about counts as outside of the mesh.
    #[cfg(feature = "test-knobs")]
    pub skip_demand: bool,
    /// All ports of a pod share one budget, and nobody's share of it is bounded.
    #[cfg(feature = "test-knobs")]
    pub share_budgets: bool,
    /// A tunnel outlives its client's certificate.
    #[cfg(feature = "test-knobs")]
    pub keep_expired_tunnels: bool,
    /// Open connections are not judged again.
    #[cfg(feature = "test-knobs")]
    pub skip_reauthorization: bool,
}

macro_rules! knob {
    ($($method:ident, $field:ident;)*) => {
        impl ProxyKnobs {
            $(
                #[cfg(feature = "test-knobs")]
                pub(super) fn $method(self) -> bool {
                    !self.$field
                }

                #[cfg(not(feature = "test-knobs"))]
                pub(super) const fn $method(self) -> bool {
                    true
                }
            )*
        }
    };
}

knob! {
    asks_policy, skip_policy;
    checks_authority, skip_authority;
    checks_forwarded, skip_forwarded_check;
    reauthorizes, skip_reauthorization;
    awaits_mesh, skip_mesh_wait;
    asks_control_plane, skip_demand;
    separates_budgets, share_budgets;
    refuses_expired_clients, keep_expired_tunnels;
}
