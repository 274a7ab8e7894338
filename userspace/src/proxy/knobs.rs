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
}
