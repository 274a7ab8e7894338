//! What short-circuited flows have carried, by all of them together: those that have ended and those that are open.

use std::sync::Mutex;

use aya::maps::{Array, HashMap, MapData};
use culvert_abi::{FlowKey, ShortFlow, ShortSide, kept};

use super::{
    KernelError, sys,
    tables::{all, lock},
};

/// Counted since the maps were made, but for `open`. Whatever is read while flows end, no count is ever below an earlier one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShortCounts {
    /// Flows whose sockets are in the map now.
    pub open: u64,
    pub redirected_bytes: u64,
    pub redirected_messages: u64,
    /// Bytes of the same flows that went by TCP after all.
    pub tcp_bytes: u64,
    /// Messages by TCP, for each of [`kept`].
    pub tcp_messages: [u64; kept::COUNT],
}

impl ShortCounts {
    fn add(&mut self, side: &ShortSide) {
        let add = |total: &mut u64, more: u64| *total = total.saturating_add(more);
        add(&mut self.redirected_bytes, side.redirected);
        add(&mut self.redirected_messages, side.messages);
        add(&mut self.tcp_bytes, side.tcp_bytes);
        for (total, more) in self.tcp_messages.iter_mut().zip(side.by_tcp) {
            add(total, more);
        }
    }

    /// A flow that ended during a look may have been missed by it.
    fn not_below(&mut self, earlier: &Self) {
        let keep = |now: &mut u64, earlier: u64| *now = (*now).max(earlier);
        keep(&mut self.redirected_bytes, earlier.redirected_bytes);
        keep(&mut self.redirected_messages, earlier.redirected_messages);
        keep(&mut self.tcp_bytes, earlier.tcp_bytes);
        for (now, earlier) in self.tcp_messages.iter_mut().zip(earlier.tcp_messages) {
            keep(now, earlier);
        }
    }
}

/// The maps SHORT_FLOWS and SHORT_ENDED.
pub struct ShortCounters {
    flows: Mutex<HashMap<MapData, FlowKey, ShortFlow>>,
    ended: Array<MapData, ShortSide>,
    last: Mutex<ShortCounts>,
}

impl ShortCounters {
    pub(super) fn new(
        flows: HashMap<MapData, FlowKey, ShortFlow>,
        ended: Array<MapData, ShortSide>,
    ) -> Self {
        Self {
            flows: Mutex::new(flows),
            ended,
            last: Mutex::default(),
        }
    }

    /// What has been counted by now.
    pub fn read(&self) -> ShortCounts {
        let mut last = lock(&self.last);
        match self.look() {
            Ok(mut counts) => {
                counts.not_below(&last);
                *last = counts;
            }
            Err(error) => tracing::warn!(%error, "short-circuited flows cannot be counted"),
        }
        *last
    }

    fn look(&self) -> Result<ShortCounts, KernelError> {
        let mut counts = ShortCounts::default();
        // In this order a flow that ends meanwhile is missing once. In the other it would be counted twice, for ever.
        let ended = self.ended.get(&0, 0);
        counts.add(&ended.map_err(|error| KernelError::map("SHORT_ENDED", error))?);
        for (_, flow) in all("SHORT_FLOWS", &lock(&self.flows), sys::BatchReads::Copies)? {
            counts.open += 1;
            flow.sides.iter().for_each(|side| counts.add(side));
        }
        Ok(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_a_flow_that_ends_between_two_reads_are_not_taken_back() {
        let mut earlier = ShortCounts::default();
        earlier.add(&ShortSide {
            redirected: 10,
            messages: 1,
            by_tcp: [2; kept::COUNT],
            tcp_bytes: 30,
            ..ShortSide::default()
        });
        earlier.open = 1;
        let mut now = ShortCounts {
            tcp_bytes: 50,
            ..ShortCounts::default()
        };
        now.not_below(&earlier);
        let expected = ShortCounts {
            open: 0,
            tcp_bytes: 50,
            ..earlier
        };
        assert_eq!(now, expected);
    }
}
