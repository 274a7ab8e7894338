//! Forged claims by IPv6: crafted SYNs in the name of another's address and port, as `forgery` has them by IPv4.

use anyhow::Result;

use crate::forgery::{Family, is_not_read, is_worth_nothing, race_a_lost_syn, reuse_after_close};

#[test]
fn a_spoofed_ipv6_source_with_another_sequence_number_is_not_read() -> Result<()> {
    is_not_read(Family::V6)
}

#[test]
fn twin_without_sequence_numbers_a_spoofed_ipv6_source_is_read() -> Result<()> {
    let scene = Family::V6.scene("skip-sequence")?;
    let forgery = race_a_lost_syn(&scene, Family::V6)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

#[test]
fn twin_without_isolation_a_spoofed_ipv6_source_is_read() -> Result<()> {
    let scene = Family::V6.scene("skip-isolation")?;
    let forgery = race_a_lost_syn(&scene, Family::V6)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

#[test]
fn an_ipv6_tuple_that_was_closed_is_worth_nothing() -> Result<()> {
    is_worth_nothing(Family::V6)
}

#[test]
fn twin_with_claims_kept_a_closed_ipv6_tuple_is_admitted() -> Result<()> {
    let scene = Family::V6.scene("keep-claims,skip-sequence")?;
    let forgery = reuse_after_close(&scene, Family::V6)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}
