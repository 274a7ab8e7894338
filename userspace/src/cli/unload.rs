//! `culvert unload`: needs no agent, and refuses while one runs.

use std::{io::Write, time::Duration};

use serde::Serialize;

use super::{CliError, UnloadArgs, table::clean};
use crate::{
    config::{self, Environment},
    node::{self, Unloaded},
};

/// What is printed as JSON.
#[derive(Serialize)]
struct Answer<'a> {
    pin_dir: &'a str,
    /// There was something to take away.
    found: bool,
    #[serde(flatten)]
    done: Option<&'a Unloaded>,
}

/// Takes the kernel part away and tells what went.
///
/// # Errors
/// See [`CliError`].
pub fn unload(
    args: &UnloadArgs,
    environment: &Environment,
    out: &mut impl Write,
) -> Result<(), CliError> {
    let pin_dir = config::pin_dir(args.pin_dir.as_deref(), environment)?;
    let admin_socket = config::admin_socket(args.agent.admin_socket.as_deref(), environment)?;
    let packet_mark = config::packet_mark(args.packet_mark.as_deref(), environment)?;
    let timeout = Duration::from_secs(args.timeout);
    let done = node::unload(&pin_dir, &admin_socket, packet_mark, timeout)?;
    let place = pin_dir.display().to_string();
    if args.json {
        let answer = Answer {
            pin_dir: &place,
            found: done.is_some(),
            done: done.as_ref(),
        };
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
    } else {
        out.write_all(text(&place, done.as_ref()).as_bytes())?;
    }
    out.flush()?;
    Ok(())
}

fn text(place: &str, done: Option<&Unloaded>) -> String {
    let Some(done) = done else {
        return format!("nothing is there: {place}\n");
    };
    let removed = &done.removed;
    let mut lines = vec![
        format!("unloaded {place}"),
        format!(
            "removed {} links, {} programs, {} maps, {} pins; nothing of them is left",
            removed.links, removed.programs, removed.maps, removed.pins
        ),
    ];
    let undone = done.pods.iter().filter(|pod| pod.error.is_none()).count();
    lines.push(format!("took down the routing of {undone} pods"));
    for pod in &done.pods {
        if let Some(error) = &pod.error {
            lines.push(format!(
                "pod {} keeps parts of its routing: {error}",
                pod.uid
            ));
        }
    }
    if !done.pods.is_empty() {
        lines.push("an agent that starts here serves these pods again".to_owned());
    }
    if removed.open_flows > 0 {
        lines.push(format!(
            "{} direct flows go on; nothing revokes them any more",
            removed.open_flows
        ));
    }
    if done.unread > 0 {
        lines.push(format!(
            "{} short-circuited flows were reset: what was sent last had not been read when the time was over",
            done.unread
        ));
    }
    if done.in_flight > 0 {
        lines.push(format!(
            "{} connections were still on their way when the time was over",
            done.in_flight
        ));
    }
    lines.iter().map(|line| clean(line) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{kernel::Removed, node::UndonePod};

    #[test]
    fn what_is_left_is_said_and_names_cannot_write_to_the_terminal() {
        assert_eq!(text("/pins", None), "nothing is there: /pins\n");
        let done = Unloaded {
            removed: Removed {
                open_flows: 3,
                ..Removed::default()
            },
            in_flight: 0,
            unread: 0,
            pods: vec![UndonePod {
                uid: "a\u{1b}[2J".to_owned(),
                error: Some("gone".to_owned()),
            }],
        };
        let said = text("/pins", Some(&done));
        for part in [
            "unloaded /pins",
            "3 direct flows go on",
            "keeps parts of its routing: gone",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(!said.contains('\u{1b}'));
    }
}
