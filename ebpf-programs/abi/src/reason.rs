//! Why a hook did something other than let a connection pass: the one list behind counters, metrics and docs.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $index:literal, $name:literal;)*) => {
        /// Index into the per-CPU counter array. Append-only: a number keeps its meaning for ever.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Reason { $($(#[doc = $doc])+ $variant = $index,)* }

        /// Length of the counter array.
        pub const REASON_COUNT: u32 = [$($name),*].len() as u32;

        impl Reason {
            pub const ALL: [Self; REASON_COUNT as usize] = [$(Self::$variant),*];

            /// Label value in metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One sentence for the metrics reference.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+),)* }
            }

            pub fn from_index(index: u32) -> Option<Self> {
                Self::ALL.into_iter().find(|reason| *reason as u32 == index)
            }
        }
    };
}

reasons! {
    /// connect: allowed by a current verdict, the two applications talk directly.
    Direct = 0, "direct";
    /// connect: handed to the agent, the destination is not a pod of this node.
    SteeredRemote = 1, "steered_remote";
    /// connect: handed to the agent, no verdict is cached for this pair.
    SteeredUnknownVerdict = 2, "steered_unknown_verdict";
    /// connect: handed to the agent, the cached verdict is of an older policy.
    SteeredOldGeneration = 3, "steered_old_generation";
    /// connect: handed to the agent, the verdict's heartbeat is older than verdict_max_age.
    SteeredStaleHeartbeat = 4, "steered_stale_heartbeat";
    /// connect: handed to the agent, the destination may not be reached directly (configuration, waypoint, own port).
    SteeredNotEligible = 5, "steered_not_eligible";
    /// connect: refused, a cached verdict denies it.
    RefusedByPolicy = 6, "refused_by_policy";
    /// connect: not used any more; IPv6 destinations were not carried once.
    RefusedIpv6 = 7, "refused_ipv6";
    /// connect: refused, the socket could not be marked for steering.
    RefusedNoMark = 8, "refused_no_mark";
    /// connect: refused, no socket storage could be had.
    RefusedNoStorage = 9, "refused_no_storage";
    /// claim: not published, the pod has too many connections in the making.
    ClaimQuota = 10, "claim_quota";
    /// claim: not published, the map is full.
    ClaimMapFull = 11, "claim_map_full";
    /// claim: not published, the socket's source address is not the pod's.
    ClaimForeignSource = 12, "claim_foreign_source";
    /// inbound: admitted to the application by a direct claim.
    AdmittedDirect = 13, "admitted_direct";
    /// inbound: admitted to the application by a claim of the agent.
    AdmittedProxy = 14, "admitted_proxy";
    /// inbound: given to the agent's outbound listener.
    ToOutbound = 15, "to_outbound";
    /// inbound: given to the agent's HBONE listener.
    ToHbone = 16, "to_hbone";
    /// inbound: given to the agent's plaintext listener.
    ToPlaintext = 17, "to_plaintext";
    /// inbound: dropped, addressed to a port that only the agent may use.
    DroppedOwnPort = 18, "dropped_own_port";
    /// inbound: dropped, the agent's listener is missing.
    DroppedNoListener = 19, "dropped_no_listener";
    /// inbound: dropped, the claim is of an older policy or another pod.
    DroppedStaleClaim = 20, "dropped_stale_claim";
    /// establishment: isolated, no claim names this connection.
    IsolatedNoClaim = 21, "isolated_no_claim";
    /// establishment: isolated, the sequence number is not the claim's.
    IsolatedSequence = 22, "isolated_sequence";
    /// establishment: isolated, the claim is for another pod.
    IsolatedWrongPod = 23, "isolated_wrong_pod";
    /// establishment: isolated, the policy changed between claim and establishment.
    IsolatedOldGeneration = 24, "isolated_old_generation";
    /// establishment: isolated, the flow table is full.
    IsolatedFlowMapFull = 25, "isolated_flow_map_full";
    /// establishment: a connection that had to be isolated could not be; the agent destroys it.
    IsolationFailed = 26, "isolation_failed";
    /// telemetry: an event did not fit into the ring buffer.
    EventLost = 27, "event_lost";
    /// inbound: admitted to the application, a pod's connection to its own address.
    AdmittedOwnAddress = 28, "admitted_own_address";
    /// connect: refused, the socket is bound to a device and so cannot be steered to the agent.
    RefusedBoundDevice = 29, "refused_bound_device";
    /// connect: refused, the agent that would carry the connection is not there.
    RefusedNoAgent = 30, "refused_no_agent";
    /// establishment: isolated at the client's end, the destination's namespace did not admit the connection.
    IsolatedNotAdmitted = 31, "isolated_not_admitted";
    /// telemetry: refusals of a pod beyond 100 in a second were counted but not reported one by one.
    RefusalNotReported = 32, "refusal_not_reported";
    /// connect: handed to the agent, the pod or the node has too many direct flows.
    SteeredFlowQuota = 33, "steered_flow_quota";
    /// connect: handed to the agent, a change of policy was being written at this moment.
    SteeredChanging = 34, "steered_changing";
    /// connect: handed to the agent, the socket is bound to an address that is not known as the pod's.
    SteeredForeignSource = 35, "steered_foreign_source";
    /// connect: handed to the agent, the endpoint that was chosen for a service has just gone.
    SteeredEndpointGone = 36, "steered_endpoint_gone";
    /// inbound: admitted to the application, a process of the node outside all pods (kubelet's probes).
    AdmittedNode = 37, "admitted_node";
    /// inbound: left alone, the kernel part is being unloaded.
    PassedLeaving = 38, "passed_leaving";
    /// connect: an endpoint of a service was chosen.
    ServiceResolved = 39, "service_resolved";
    /// connect: refused, what is known of the pod was changing faster than it could be read.
    RefusedUnsettled = 40, "refused_unsettled";
    /// telemetry: an isolation did not fit into its ring buffer; the agent looks for the sockets.
    AlarmLost = 41, "alarm_lost";
}
