//! Random sequences of socket calls over short-circuited flows, compared call by call with the same over plain TCP, while agents come
//! and go as well.

use std::env;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use culvert_harness::{Fabric, Pod, stretch};
use culvert_tests::scene::{PORT, Scene, connect_to, proposed_to};
use serde_json::Value;

use crate::{restart::start, short_circuit::stage};

/// Programs that run a part of them each, at ports of their own.
const AT_ONCE: u16 = 4;
/// From the first round trip on; otherwise from the sixteenth.
const EAGER: &str = "eager-short-circuit";
/// What sets the number and the seed of a long run.
const COUNT: &str = "CULVERT_TEST_SEQUENCES";
const SEED: &str = "CULVERT_TEST_SEED";
const MANY: u32 = 200_000;

/// What came of each call of one sequence.
type Said = Vec<String>;

/// Which sequences.
#[derive(Clone, Copy)]
struct Which {
    seed: u64,
    count: u32,
}

impl Which {
    /// Of the usual seed, on this machine; under emulation a twentieth.
    fn usual(count: u32) -> Self {
        let emulated = stretch(Duration::from_secs(1)) > Duration::from_secs(1);
        let count = if emulated { count / 20 } else { count };
        Self { seed: 1, count }
    }

    /// As somebody asks for in the environment.
    fn asked_for() -> Result<Self> {
        let number = |name: &str, otherwise: u64| match env::var(name) {
            Ok(text) => text.parse().with_context(|| format!("{name}={text}")),
            Err(_) => Ok(otherwise),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        Ok(Self {
            seed: number(SEED, now)?,
            count: u32::try_from(number(COUNT, u64::from(MANY))?)?,
        })
    }

    /// What each sequence said. An error where bytes were not what the other end had sent.
    fn run(self, client: &Pod, server: &Pod) -> Result<Vec<Said>> {
        // Most of the time is spent waiting.
        let parts: Vec<Result<Vec<Said>>> = thread::scope(|scope| {
            let begun: Vec<_> = (0..AT_ONCE)
                .map(|part| scope.spawn(move || self.run_part(client, server, part)))
                .collect();
            let ended = begun.into_iter().map(|part| part.join().unwrap());
            ended.collect()
        });
        Ok(parts.into_iter().collect::<Result<Vec<_>>>()?.concat())
    }

    fn run_part(self, client: &Pod, server: &Pod, part: u16) -> Result<Vec<Said>> {
        let count = self.count / u32::from(AT_ONCE);
        let to = server.at(PORT + part);
        let launch = client
            .probe()?
            .args(["sequences", "--to", &to, "--netns"])
            .arg(server.netns().path())
            .args(["--first", &(u32::from(part) * count).to_string()])
            .args(["--count", &count.to_string()])
            .args(["--seed", &self.seed.to_string()]);
        let a_while = Duration::from_secs(300) + Duration::from_millis(20) * count;
        let text = launch.run(a_while)?.success()?;
        let said = text.lines().filter_map(|line| {
            let line: Value = serde_json::from_str(line).ok()?;
            let said = line.get("said")?.as_array()?.iter();
            Some(said.filter_map(Value::as_str).map(str::to_owned).collect())
        });
        let said: Vec<_> = said.collect();
        ensure!(said.len() == count as usize, "{} of {count}", said.len());
        Ok(said)
    }

    fn run_plain(self) -> Result<Vec<Said>> {
        let fabric = Fabric::new()?;
        let node = fabric.node()?;
        self.run(&node.pod("client")?, &node.pod("server-a")?)
    }

    /// How many sequences were told otherwise of an end that is known to differ; an error for any other difference.
    fn compare(self, plain: &[Said], short: &[Said]) -> Result<usize> {
        let mut known = 0;
        for (number, (plain, short)) in plain.iter().zip(short).enumerate() {
            let both = plain.iter().zip(short);
            let sequence = format!("sequence {number} of seed {}", self.seed);
            let Some(at) = both.clone().position(|(plain, short)| plain != short) else {
                ensure!(plain.len() == short.len(), "{sequence}");
                continue;
            };
            let (before, said) = (short.get(..at), short.get(at));
            ensure!(
                before.is_some_and(is_cut_off),
                "{sequence}: {:?} over plain TCP, {said:?} here, after {before:?}",
                plain.get(at)
            );
            known += 1;
        }
        Ok(known)
    }
}

/// As [`stage`]; the first connection to each port has been.
fn short(knobs: &'static str) -> Result<Scene> {
    let scene = stage(knobs)?;
    for part in 0..AT_ONCE {
        let to = scene.server_a.at(PORT + part);
        connect_to(&scene.client, &to, &["--send", "x", "--read", "1"])?;
    }
    Ok(scene)
}

/// Whether an end was closed with something unread: the other end is known not to be told of it. Or aborted: how much of what it had
/// sent arrives is left to chance, over plain TCP as well.
fn is_cut_off(said: &[String]) -> bool {
    let closes = |what: &String| what.contains(" closes with ") && !what.ends_with(" 0 unread");
    said.iter()
        .any(|what| closes(what) || what.contains(" aborts with "))
}

#[test]
fn every_call_says_what_it_says_over_plain_tcp() -> Result<()> {
    let which = Which::usual(7_500);
    let plain = which.run_plain()?;
    let scene = short(EAGER)?;
    let short = which.run(&scene.client, &scene.server_a)?;
    let entered = scene.short_circuited()?;
    let count = which.count;
    ensure!(entered > f64::from(count) / 20.0, "{entered} of {count}");
    let known = which.compare(&plain, &short)?;
    println!("{entered} of {count} sequences short-circuited; {known} told of an end otherwise");
    Ok(())
}

#[test]
fn twin_without_the_rule_of_unread_bytes_they_are_overtaken() -> Result<()> {
    let scene = short("eager-short-circuit,skip-unread")?;
    let said = Which::usual(10_000).run(&scene.client, &scene.server_a);
    let error = said
        .map(|_| ())
        .expect_err("no byte was overtaken")
        .to_string();
    assert!(error.contains("is not what"), "{error}");
    Ok(())
}

/// Agents that are killed and come again while sequences run, in turns those that take flows in early and those that do it late.
fn agents_come_and_go(which: Which) -> Result<()> {
    let plain = which.run_plain()?;
    let mut scene = short(EAGER)?;
    let (agent, node) = (&mut scene.agent1, &scene.node1);
    let (client, server) = (&scene.client, &scene.server_a);
    let (short, restarts, entered) = thread::scope(|scope| {
        let running = scope.spawn(|| which.run(client, server));
        let (mut restarts, mut entered) = (0, 0.0);
        while !running.is_finished() {
            // Some die before they have begun.
            thread::sleep(Duration::from_millis(50 << (restarts % 6)));
            // It counts from its start.
            entered += proposed_to(agent, "entered")?;
            agent.kill()?;
            restarts += 1;
            *agent = start(node, if restarts % 2 == 0 { EAGER } else { "" })?;
            agent.ready()?;
        }
        anyhow::Ok((running.join().unwrap()?, restarts, entered))
    })?;
    let known = which.compare(&plain, &short)?;
    let count = which.count;
    println!(
        "{restarts} agents short-circuited {entered} of {count}; {known} told of an end otherwise"
    );
    // Under emulation an agent needs as long to begin as all sequences take.
    let is_quick = stretch(Duration::from_secs(1)) == Duration::from_secs(1);
    ensure!(
        !is_quick || restarts > 2 && entered > 0.0,
        "{restarts} agents short-circuited {entered}"
    );
    Ok(())
}

#[test]
fn agents_that_come_and_go_change_nothing_of_it() -> Result<()> {
    agents_come_and_go(Which::usual(5_000))
}

#[test]
#[ignore = "long: CULVERT_TEST_SEQUENCES and CULVERT_TEST_SEED say how many, and which"]
fn as_many_sequences_as_are_asked_for() -> Result<()> {
    let which = Which::asked_for()?;
    // Known even of a run that does not come to its end.
    eprintln!("{} sequences of seed {}", which.count, which.seed);
    agents_come_and_go(which)
}
