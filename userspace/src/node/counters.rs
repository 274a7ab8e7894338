//! What the kernel part counts, as the metrics want it.

use culvert_abi::{Reason, kept};

use crate::{
    kernel::{DiagThreads, ShortCounts, Tables},
    telemetry::{KernelCounters, ShortCircuited},
};

/// Read at every scrape.
pub fn read(tables: &Tables, diag: &DiagThreads) -> KernelCounters {
    let counters = tables.counters();
    let lost = Reason::EventLost;
    KernelCounters {
        lost_events: counters
            .iter()
            .find(|(reason, _)| *reason == lost)
            .map_or(0, |(_, count)| *count),
        open_flows: tables.open_flows(),
        stuck_pods: diag.stuck() as u64,
        short_circuited: short_circuited(&tables.short().read()),
        decisions: counters
            .into_iter()
            .map(|(reason, count)| (reason.name(), count))
            .collect(),
    }
}

fn short_circuited(counts: &ShortCounts) -> ShortCircuited {
    let by_tcp = kept::ALL.iter().zip(counts.tcp_messages);
    ShortCircuited {
        open: counts.open,
        bytes: vec![
            ("redirected", counts.redirected_bytes),
            ("tcp", counts.tcp_bytes),
        ],
        messages: std::iter::once(("redirected", counts.redirected_messages))
            .chain(by_tcp.map(|((name, _), count)| (*name, count)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_and_each_reason_has_its_count() {
        let mut counts = ShortCounts {
            redirected_bytes: 10,
            redirected_messages: 2,
            tcp_bytes: 30,
            ..ShortCounts::default()
        };
        counts.tcp_messages[kept::UNREAD as usize] = 4;
        let found = short_circuited(&counts);
        assert_eq!(found.bytes, [("redirected", 10), ("tcp", 30)]);
        assert_eq!(found.messages.len(), 1 + kept::COUNT);
        for expected in [("redirected", 2), ("unread", 4), ("full", 0)] {
            assert!(found.messages.contains(&expected), "{expected:?}");
        }
    }
}
