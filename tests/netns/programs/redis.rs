//! redis: its own benchmark, also pipelined, a mass insertion, and what the server holds afterwards.

use anyhow::Result;
use culvert_harness::Proc;

use crate::stage::{End, Least, Mode, Stage, compare};

const PORT: u16 = 6379;

pub fn check(mode: Mode) -> Result<()> {
    compare(
        mode,
        &[(End::Client, End::Server, PORT)],
        Least {
            direct: 100,
            short: 100,
        },
        |stage, told| {
            let _server = serve(stage)?;
            let host = stage.server.address();
            let ask = |command: &str| stage.shell(&format!("redis-cli -h {host} {command}"));
            let benchmark = |options: &str| -> Result<String> {
                let said =
                    stage.shell(&format!("redis-benchmark -h {host} --csv {options} 2>&1"))?;
                // Without the figures.
                let tests = said
                    .lines()
                    .map(|line| line.split("\",\"").next().unwrap_or_default());
                Ok(tests.collect::<Vec<_>>().join("\n"))
            };
            // A key for each, so that what is there at the end tells of every request.
            for (case, options) in [
                (
                    "single",
                    "-n 8000 -c 20 -d 100 -t ping,set,get,incr,lpush,lpop,sadd,mset",
                ),
                (
                    "pipelined",
                    "-n 32000 -c 20 -P 16 -d 100 -t set,get,incr,lrange_100",
                ),
                ("deep", "-n 20000 -c 4 -P 500 -d 3 -t set,get,incr,lpush"),
                ("large", "-n 500 -c 5 -d 300000 -t set,get"),
                ("large pipelined", "-n 500 -c 5 -P 10 -d 100000 -t set,get"),
                ("connection each", "-n 1000 -c 10 -k 0 -t ping,incr"),
            ] {
                told.say(case, benchmark(options)?);
                told.say(case, ask("get counter:__rand_int__")?);
                told.say(case, ask("debug digest")?);
            }
            let insert = format!(
                "for ((i = 0; i < 20000; i++)); do printf 'SET key:%d value-%d\\r\\n' $i $((i * 7919)); done | \
             redis-cli -h {host} --pipe"
            );
            let inserted = stage.shell(&insert)?;
            told.say("insertion", inserted.lines().last().unwrap_or_default());
            told.say("insertion", ask("dbsize")?);
            told.say("insertion", ask("debug digest")?);
            Ok(())
        },
    )
}

pub fn serve(stage: &Stage) -> Result<Proc> {
    let server = stage
        .server
        .command("redis-server")
        .args(["--port", &PORT.to_string(), "--bind", "0.0.0.0"])
        .args(["--protected-mode", "no", "--enable-debug-command", "yes"])
        .args([
            "--save",
            "",
            "--appendonly",
            "no",
            "--loglevel",
            "warning",
            "--dir",
        ])
        .arg(stage.directory());
    stage.serve(End::Server, PORT, server)
}
