//! The protections a test switches off, by name. In a build without the feature `test-knobs` there are none.

use super::NodeError;
use crate::{admin::socket, config::Config, identity, proxy::ProxyKnobs};

/// What is switched off where.
#[derive(Clone, Debug, Default)]
pub struct Knobs {
    /// Bits of `culvert_abi::knob`.
    pub kernel: u32,
    pub proxy: ProxyKnobs,
    pub identity: identity::TestKnobs,
    /// Whom the admin socket answers.
    pub admin: socket::Limits,
    /// Pods may go on accepting data in a SYN.
    pub keep_fast_open: bool,
    /// Open flows and old verdicts stay when policy changes.
    pub skip_sweep: bool,
    /// Verdicts that have to make room stay in the table.
    pub keep_old_verdicts: bool,
    /// A pod keeps addresses that the mesh gives to others.
    pub keep_foreign_addresses: bool,
    /// What the kernel part knows of services does not follow the mesh.
    pub skip_service_sync: bool,
    /// Whoever serves istio-cni's socket is believed.
    pub any_cni_user: bool,
    /// The kernel part leaves every connection alone: what it costs to be there.
    pub leave_alone: bool,
}

impl Knobs {
    #[cfg(not(feature = "test-knobs"))]
    pub fn of(_: &Config) -> Result<Self, NodeError> {
        Ok(Self::default())
    }

    #[cfg(feature = "test-knobs")]
    pub fn of(config: &Config) -> Result<Self, NodeError> {
        use culvert_abi::knob;
        let mut knobs = Self::default();
        for name in &config.test_knobs {
            match name.as_str() {
                "skip-sequence" => knobs.kernel |= knob::SKIP_SEQUENCE,
                "keep-claims" => knobs.kernel |= knob::KEEP_CLAIMS,
                "skip-generation" => knobs.kernel |= knob::SKIP_GENERATION,
                "unknown-verdict-allows" => knobs.kernel |= knob::UNKNOWN_VERDICT_ALLOWS,
                "pass-unclaimed" => knobs.kernel |= knob::PASS_UNCLAIMED,
                "pass-own-ports" => knobs.kernel |= knob::PASS_OWN_PORTS,
                "skip-isolation" => knobs.kernel |= knob::SKIP_ISOLATION,
                "deny-allows" => knobs.kernel |= knob::DENY_ALLOWS,
                "skip-steering" => knobs.kernel |= knob::SKIP_STEERING,
                "missing-listener-passes" => knobs.kernel |= knob::MISSING_LISTENER_PASSES,
                "skip-admitted" => knobs.kernel |= knob::SKIP_ADMITTED,
                "keep-fast-open" => knobs.keep_fast_open = true,
                "skip-quotas" => knobs.kernel |= knob::SKIP_QUOTAS,
                "host-pods-are-node" => knobs.kernel |= knob::HOST_PODS_ARE_NODE,
                "skip-slot-check" => knobs.kernel |= knob::SKIP_SLOT_CHECK,
                "skip-changing" => knobs.kernel |= knob::SKIP_CHANGING,
                "skip-source-check" => knobs.kernel |= knob::SKIP_SOURCE_CHECK,
                "skip-claim-source" => knobs.kernel |= knob::SKIP_CLAIM_SOURCE,
                "eager-short-circuit" => knobs.kernel |= knob::EAGER_SHORT_CIRCUIT,
                "skip-unread" => knobs.kernel |= knob::SKIP_UNREAD,
                "skip-readers" => knobs.kernel |= knob::SKIP_READERS,
                "skip-limit" => knobs.kernel |= knob::SKIP_LIMIT,
                "skip-reader-flags" => knobs.kernel |= knob::SKIP_READER_FLAGS,
                "skip-waiters" => knobs.kernel |= knob::SKIP_WAITERS,
                "skip-calls" => knobs.kernel |= knob::SKIP_CALLS,
                "little-memory" => knobs.kernel |= knob::LITTLE_MEMORY,
                "keep-old-verdicts" => knobs.keep_old_verdicts = true,
                "skip-sweep" => knobs.skip_sweep = true,
                "leave-alone" => knobs.leave_alone = true,
                "skip-service-sync" => knobs.skip_service_sync = true,
                "keep-foreign-addresses" => knobs.keep_foreign_addresses = true,
                "skip-policy" => knobs.proxy.skip_policy = true,
                "skip-authority" => knobs.proxy.skip_authority = true,
                "skip-reauthorization" => knobs.proxy.skip_reauthorization = true,
                "skip-client-certificate" => knobs.proxy.tls.skip_client_certificate = true,
                "skip-chain" => knobs.proxy.tls.skip_chain = true,
                "skip-server-identity" => knobs.proxy.tls.skip_server_identity = true,
                "skip-trust-domain" => knobs.proxy.tls.skip_trust_domain = true,
                "skip-revocation-lists" => knobs.proxy.tls.skip_revocation_lists = true,
                "keep-revoked-tunnels" => knobs.proxy.tls.keep_revoked_tunnels = true,
                "present-expired" => {
                    knobs.identity.present_expired = true;
                    knobs.proxy.tls.present_expired = true;
                }
                "replace-roots" => knobs.identity.replace_roots = true,
                "skip-mesh-wait" => knobs.proxy.skip_mesh_wait = true,
                "skip-demand" => knobs.proxy.skip_demand = true,
                "share-budgets" => knobs.proxy.share_budgets = true,
                "keep-expired-tunnels" => knobs.proxy.keep_expired_tunnels = true,
                "skip-forwarded-check" => knobs.proxy.skip_forwarded_check = true,
                "skip-cni-credentials" => knobs.any_cni_user = true,
                "skip-peer-credentials" => knobs.admin.any_user = true,
                other => return Err(NodeError::UnknownKnob(other.to_owned())),
            }
            tracing::error!(knob = %name, "a protection is switched off for a test");
        }
        Ok(knobs)
    }
}
