//! What is told of a direct flow's short-circuit: whether it was, or why not, and what was redirected.

use std::sync::Arc;

use super::pair::Pair;
use crate::{
    kernel::{FlowEvent, FlowName, ShortState},
    node::outcomes::Outcomes,
    telemetry::FlowRecord,
};

/// Sockets of the flow were short-circuited.
const YES: &str = "yes";
/// The mesh does not have it on for both ends at this port.
const OFF: &str = FlowRecord::NOT_SHORT_CIRCUITED;
/// It made fewer round trips than it takes.
const BRIEF: &str = "brief";
/// Nothing is short-circuited on this kernel.
const KERNEL: &str = "kernel";
/// It was worth it, but ended first, or there was no agent.
const MISSED: &str = "missed";

/// Bytes that were redirected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Redirected {
    pub by_client: u64,
    pub by_server: u64,
}

/// What is told of one flow; nothing while nothing is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Short {
    word: Option<&'static str>,
    redirected: Redirected,
}

impl Short {
    /// Enters it into the record of the flow.
    pub fn tell(&self, record: &mut FlowRecord) {
        record.short_circuit = self.word.map(Into::into);
        if self.word == Some(YES) {
            record.redirected_sent = Some(self.redirected.by_server);
            record.redirected_received = Some(self.redirected.by_client);
        }
    }
}

/// What is known of all flows.
pub struct Shorts {
    pub outcomes: Arc<Outcomes>,
    /// Flows may be short-circuited on this kernel.
    pub possible: bool,
}

impl Shorts {
    /// Of a flow that is open; `redirected` if its sockets were entered.
    pub fn of_open(&self, flow: &FlowName, pair: &Pair, redirected: Option<Redirected>) -> Short {
        let state = redirected.map(|_| ShortState::Entered);
        let (key, _) = flow;
        let redirected = redirected.unwrap_or_default();
        let known = || self.outcomes.of(flow);
        Short {
            word: self.word(state, redirected, known, || pair.is_on(key.server_port)),
            redirected,
        }
    }

    /// Of a flow that has ended.
    pub fn of_ended(&self, event: &FlowEvent, pair: &Pair) -> Short {
        let redirected = Redirected {
            by_client: event.redirected_sent,
            by_server: event.redirected_received,
        };
        let known = || self.outcomes.take(&event.name());
        let is_on = || pair.is_on(event.key.server_port);
        Short {
            word: self.word(Some(event.short_state), redirected, known, is_on),
            redirected,
        }
    }

    /// How far an open flow has come is not known before it is entered.
    fn word(
        &self,
        state: Option<ShortState>,
        redirected: Redirected,
        known: impl FnOnce() -> Option<&'static str>,
        is_on: impl FnOnce() -> bool,
    ) -> Option<&'static str> {
        if redirected != Redirected::default() {
            return Some(YES);
        }
        // Most flows; nobody was ever asked about them.
        if state == Some(ShortState::Off) {
            return Some(OFF);
        }
        if state != Some(ShortState::Brief)
            && let Some(reason) = known()
        {
            return Some(reason);
        }
        if state == Some(ShortState::Entered) {
            return Some(YES);
        }
        if !is_on() {
            return Some(OFF);
        }
        if !self.possible {
            return Some(KERNEL);
        }
        state.map(|state| match state {
            ShortState::Brief => BRIEF,
            ShortState::Off | ShortState::Proposed | ShortState::Entered => MISSED,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: Redirected = Redirected {
        by_client: 1,
        by_server: 0,
    };

    fn word(
        state: Option<ShortState>,
        redirected: Redirected,
        known: Option<&'static str>,
        is_on: bool,
        possible: bool,
    ) -> Option<&'static str> {
        let shorts = Shorts {
            outcomes: Arc::default(),
            possible,
        };
        shorts.word(state, redirected, || known, || is_on)
    }

    #[test]
    fn what_happened_counts_before_what_was_meant_to() {
        use ShortState::{Brief, Entered, Off, Proposed};
        let none = Redirected::default();
        let cases = [
            (Some(Entered), SOME, Some("busy"), false, "yes"),
            (Some(Entered), none, Some("busy"), true, "busy"),
            (Some(Entered), none, None, false, "yes"),
            (Some(Off), none, None, true, "off"),
            (Some(Brief), none, None, true, "brief"),
            (Some(Brief), none, None, false, "off"),
            (Some(Proposed), none, Some("blocking"), false, "blocking"),
            (Some(Proposed), none, None, true, "missed"),
            (Some(Proposed), none, None, false, "off"),
            (None, none, Some("blocking"), true, "blocking"),
            (None, none, None, false, "off"),
        ];
        for (state, redirected, known, is_on, expected) in cases {
            let found = word(state, redirected, known, is_on, true);
            assert_eq!(found, Some(expected), "{state:?} {known:?} {is_on}");
        }
        assert_eq!(word(None, none, None, true, true), None);
    }

    #[test]
    fn a_kernel_that_cannot_is_named_only_where_it_was_asked_for() {
        use ShortState::{Brief, Off, Proposed};
        let none = Redirected::default();
        for (state, is_on, expected) in [
            (Some(Brief), true, "kernel"),
            (Some(Proposed), true, "kernel"),
            (None, true, "kernel"),
            (Some(Brief), false, "off"),
            (Some(Off), true, "off"),
            (None, false, "off"),
        ] {
            assert_eq!(word(state, none, None, is_on, false), Some(expected));
        }
    }

    #[test]
    fn bytes_are_told_from_the_servers_side_and_only_of_a_flow_that_was_entered() {
        let mut record = FlowRecord::default();
        let redirected = Redirected {
            by_client: 1,
            by_server: 2,
        };
        let yes = Short {
            word: Some(YES),
            redirected,
        };
        yes.tell(&mut record);
        assert_eq!(record.short_circuit.as_deref(), Some("yes"));
        let told = (record.redirected_sent, record.redirected_received);
        assert_eq!(told, (Some(2), Some(1)));
        let mut record = FlowRecord::default();
        Short::default().tell(&mut record);
        assert_eq!(record, FlowRecord::default());
    }
}
