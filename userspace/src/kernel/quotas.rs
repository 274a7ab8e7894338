//! Which entry of QUOTAS counts for which pod. The counts themselves are the kernel part's: it counts a flow until the flow ends,
//! which may be after the pod has left. So an entry goes to another pod only when it is back at zero, as long as there is such a
//! one, and a pod that comes back finds its own.

use std::collections::{BTreeSet, HashMap};

use aya::maps::{Array, MapData};
use culvert_abi::{Pod, Quota};

use super::{KernelError, NetnsCookie};

const UNUSED: Quota = Quota {
    claims: 0,
    flows: 0,
    window_ns: 0,
    refusals: 0,
};

pub(super) struct Quotas {
    table: Array<MapData, Quota>,
    of_pods: HashMap<NetnsCookie, u32>,
    free: BTreeSet<u32>,
    /// Whose a free entry was.
    former: HashMap<u32, NetnsCookie>,
}

impl Quotas {
    /// `pods`: what an earlier agent entered.
    pub fn open(table: Array<MapData, Quota>, pods: impl Iterator<Item = (u64, Pod)>) -> Self {
        let mut free: BTreeSet<u32> = (Quota::FIRST_POD..Quota::COUNT).collect();
        let of_pods: HashMap<_, _> = pods
            .filter(|(_, pod)| free.remove(&pod.quota))
            .map(|(cookie, pod)| (NetnsCookie(cookie), pod.quota))
            .collect();
        Self {
            table,
            of_pods,
            free,
            former: HashMap::new(),
        }
    }

    /// The entry of a pod, a new one if it has none.
    pub fn of(&mut self, cookie: NetnsCookie) -> Result<u32, KernelError> {
        if let Some(index) = self.of_pods.get(&cookie) {
            return Ok(*index);
        }
        let own = self.former.iter().find(|(_, former)| **former == cookie);
        if let Some((&index, _)) = own {
            self.forgive_claims(index)?;
            self.take(index, cookie);
            return Ok(index);
        }
        let at_zero = self.free.iter().find(|index| self.is_at_zero(**index));
        let index = at_zero.or(self.free.first()).copied().ok_or_else(|| {
            let most = Quota::COUNT - Quota::FIRST_POD;
            KernelError::map("QUOTAS", format!("a node has at most {most} pods"))
        })?;
        self.table
            .set(index, UNUSED, 0)
            .map_err(|error| KernelError::map("QUOTAS", error))?;
        self.take(index, cookie);
        Ok(index)
    }

    fn take(&mut self, index: u32, cookie: NetnsCookie) {
        self.free.remove(&index);
        self.former.remove(&index);
        self.of_pods.insert(cookie, index);
    }

    pub fn forget(&mut self, cookie: NetnsCookie) {
        if let Some(index) = self.of_pods.remove(&cookie) {
            self.free.insert(index);
            self.former.insert(index, cookie);
        }
    }

    pub fn flows_of_node(&self) -> u64 {
        self.table
            .get(&Quota::NODE, 0)
            .map_or(0, |node| u64::try_from(node.flows).unwrap_or(0))
    }

    /// Whether no flow is open for sure: each is counted before it is entered, and until it is removed.
    pub fn has_no_flow(&self) -> bool {
        let node = self.table.get(&Quota::NODE, 0);
        node.is_ok_and(|node| node.flows == 0)
    }

    /// The claims of a pod that left were deleted by the agent, which counts nothing here.
    fn forgive_claims(&mut self, index: u32) -> Result<(), KernelError> {
        let quota = self.table.get(&index, 0).unwrap_or(UNUSED);
        if quota.claims == 0 {
            return Ok(());
        }
        let forgiven = Quota { claims: 0, ..quota };
        self.table
            .set(index, forgiven, 0)
            .map_err(|error| KernelError::map("QUOTAS", error))
    }

    fn is_at_zero(&self, index: u32) -> bool {
        self.table
            .get(&index, 0)
            .is_ok_and(|quota| quota.claims == 0 && quota.flows == 0)
    }
}
