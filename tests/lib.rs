//! Integration tests in network namespaces and cgroups: two nodes on one kernel, agents as processes, real connections.
//!
//! `netns/kernel` tests what the kernel part decides, `netns/proxy` what the agent carries and refuses. Every security test
//! has a twin in which its one mechanism is switched off: there the forbidden thing must happen, or the test would prove
//! nothing.

pub mod scene;
