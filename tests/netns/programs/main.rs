//! Real programs between pods of one node: over direct flows they say and do exactly what they do without a mesh. Each one
//! runs once without a mesh and once over direct flows, in a mode of the short-circuit.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests"
)]

mod languages;
mod made;
mod postgres;
mod readers;
mod redis;
mod stage;
mod streams;
mod transcript;
mod web;

/// A test of each program in each mode. Only the default's run every time.
macro_rules! programs {
    ($($name:ident => $check:path,)*) => {
        mod default {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                $check(crate::stage::Mode::Default)
            })*
        }
        mod off {
            $(#[test]
            #[ignore = "long: as in the default mode, without the short-circuit"]
            fn $name() -> anyhow::Result<()> {
                $check(crate::stage::Mode::Off)
            })*
        }
        mod on {
            $(#[test]
            #[ignore = "long: as in the default mode, with the short-circuit"]
            fn $name() -> anyhow::Result<()> {
                $check(crate::stage::Mode::On)
            })*
        }
    };
}

programs! {
    every_way_to_read_gives_the_same => crate::readers::check,
    redis_holds_the_same => crate::redis::check,
    postgres_holds_the_same => crate::postgres::check,
    nginx_gives_a_large_file_byte_for_byte => crate::web::large_file,
    nginx_answers_wrk_without_an_error => crate::web::wrk,
    nginx_gives_and_takes_with_tls => crate::web::tls,
    curl_fetches_and_puts_the_same => crate::web::curl,
    haproxy_splices_the_same => crate::web::haproxy,
    go_copies_the_same_by_splice => crate::languages::go,
    java_threads_exchange_the_same => crate::languages::java,
    iperf3_loses_nothing_either_way => crate::streams::iperf,
    stunnel_carries_the_same => crate::streams::stunnel,
    a_server_on_io_uring_answers_the_same => crate::streams::ring,
    twenty_thousand_connections_come_and_go => crate::streams::churn,
    python_tasks_exchange_the_same => crate::languages::asyncio,
    python_threads_exchange_the_same => crate::languages::threads,
    python_threads_and_tasks_exchange_the_same => crate::languages::mixed,
}
