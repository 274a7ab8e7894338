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

/// A test of each program in each mode. Every time, the default's run, and those with the short-circuit that tell most.
macro_rules! programs {
    (
        often: { $($often:ident => $check_often:path,)* }
        seldom: { $($seldom:ident => $check_seldom:path,)* }
    ) => {
        mod default {
            $(#[test]
            fn $often() -> anyhow::Result<()> {
                $check_often(crate::stage::Mode::Default)
            })*
            $(#[test]
            fn $seldom() -> anyhow::Result<()> {
                $check_seldom(crate::stage::Mode::Default)
            })*
        }
        mod off {
            $(#[test]
            #[ignore = "long: as in the default mode, without the short-circuit"]
            fn $often() -> anyhow::Result<()> {
                $check_often(crate::stage::Mode::Off)
            })*
            $(#[test]
            #[ignore = "long: as in the default mode, without the short-circuit"]
            fn $seldom() -> anyhow::Result<()> {
                $check_seldom(crate::stage::Mode::Off)
            })*
        }
        mod on {
            $(#[test]
            fn $often() -> anyhow::Result<()> {
                $check_often(crate::stage::Mode::On)
            })*
            $(#[test]
            #[ignore = "long: as in the default mode, with the short-circuit"]
            fn $seldom() -> anyhow::Result<()> {
                $check_seldom(crate::stage::Mode::On)
            })*
        }
    };
}

programs! {
    often: {
        every_way_to_read_gives_the_same => crate::readers::reading,
        redis_holds_the_same => crate::redis::check,
        nginx_answers_wrk_without_an_error => crate::web::wrk,
        python_tasks_exchange_the_same => crate::languages::asyncio,
    }
    seldom: {
        every_way_to_splice_gives_the_same => crate::readers::splicing,
        postgres_holds_the_same => crate::postgres::check,
        nginx_gives_a_large_file_byte_for_byte => crate::web::large_file,
        nginx_gives_and_takes_with_tls => crate::web::tls,
        curl_fetches_and_puts_the_same => crate::web::curl,
        haproxy_copies_the_same => crate::web::haproxy_copying,
        haproxy_splices_the_same => crate::web::haproxy_splicing,
        go_copies_the_same => crate::languages::go_copying,
        go_copies_the_same_by_splice => crate::languages::go_splicing,
        java_threads_exchange_the_same => crate::languages::java,
        iperf3_loses_nothing_either_way => crate::streams::iperf,
        stunnel_carries_the_same => crate::streams::stunnel,
        a_server_on_io_uring_answers_the_same => crate::streams::ring,
        twenty_thousand_connections_come_and_go => crate::streams::churn,
        python_threads_exchange_the_same => crate::languages::threads,
        python_threads_and_tasks_exchange_the_same => crate::languages::mixed,
    }
}
