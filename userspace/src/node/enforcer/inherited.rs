//! What an earlier agent left in the tables. It stays in force, as if nobody had taken over, until this agent has its pods
//! back and a mesh to judge by; then it is replaced at once.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use culvert_abi::{Endpoint, Pod, VerdictKey, scope};

use crate::kernel::{KernelError, NetnsCookie, Tables, socket_address};

#[derive(Default)]
pub struct Inherited {
    pub pods: HashMap<NetnsCookie, Pod>,
    pub endpoints: HashMap<IpAddr, Endpoint>,
    /// With what was decided.
    verdicts: Vec<(VerdictKey, u32)>,
}

impl Inherited {
    /// Reads the tables; changes nothing.
    pub fn read(tables: &Tables) -> Result<Self, KernelError> {
        let mut verdicts = Vec::new();
        tables.sweep_verdicts(|key, verdict| {
            verdicts.push((*key, verdict.action));
            false
        })?;
        Ok(Self {
            pods: tables.pods()?.into_iter().collect(),
            endpoints: tables
                .endpoints()?
                .into_iter()
                .map(|(address, endpoint)| (socket_address(address, 0).ip(), endpoint))
                .collect(),
            verdicts,
        })
    }

    pub fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.endpoints.is_empty() && self.verdicts.is_empty()
    }

    /// The highest number in use for anything.
    pub fn highest_number(&self) -> u32 {
        let pods = self.pods.values().map(|pod| pod.identity.max(pod.pod));
        let workloads = self.endpoints.values().map(|endpoint| endpoint.workload);
        pods.chain(workloads).max().unwrap_or(0)
    }

    pub fn highest_generation(&self) -> u64 {
        let generations = self.endpoints.values().map(|endpoint| endpoint.generation);
        generations.max().unwrap_or(0)
    }

    /// Who asked for whom, as far as both are still there, and what was decided.
    pub fn pairs(&self) -> impl Iterator<Item = (NetnsCookie, SocketAddr, u32)> {
        let by_identity: HashMap<u32, NetnsCookie> = self
            .pods
            .iter()
            .map(|(cookie, pod)| (pod.identity, *cookie))
            .collect();
        let by_number: HashMap<u32, NetnsCookie> = self
            .pods
            .iter()
            .map(|(cookie, pod)| (pod.pod, *cookie))
            .collect();
        let by_workload: HashMap<u32, IpAddr> = self
            .endpoints
            .iter()
            .map(|(ip, endpoint)| (endpoint.workload, *ip))
            .collect();
        self.verdicts.iter().filter_map(move |(key, action)| {
            let asker = match key.scope {
                scope::POD => by_number.get(&key.source),
                _ => by_identity.get(&key.source),
            }?;
            let ip = by_workload.get(&key.workload)?;
            Some((*asker, SocketAddr::new(*ip, key.port), *action))
        })
    }
}
