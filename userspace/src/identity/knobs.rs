//! Checks of identity that a test can switch off, to show that it would notice.

/// All off unless the crate is built with the feature `test-knobs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TestKnobs {
    /// An expired certificate is handed out as if it had not.
    #[cfg(feature = "test-knobs")]
    pub present_expired: bool,
    /// The roots of an answer take the place of all that were trusted before.
    #[cfg(feature = "test-knobs")]
    pub replace_roots: bool,
}

#[cfg(feature = "test-knobs")]
impl TestKnobs {
    pub(super) fn expired_withheld(self) -> bool {
        !self.present_expired
    }

    pub(super) fn roots_kept(self) -> bool {
        !self.replace_roots
    }
}

#[cfg(not(feature = "test-knobs"))]
impl TestKnobs {
    pub(super) const fn expired_withheld(self) -> bool {
        true
    }

    pub(super) const fn roots_kept(self) -> bool {
        true
    }
}
