//! Who may talk to whom: SPIFFE identities, authorization policies and their evaluation.
//!
//! Pure: no I/O, no clock, no look-ups. `mesh` collects the policies that apply to a workload and calls [`evaluate`];
//! the proxy and the kernel's verdicts act on the [`Decision`]. A [`Permit`] exists only as the outcome of an evaluation.

mod authorization;
mod evaluate;
mod identity;

#[cfg(test)]
mod naive;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod vectors;

pub use authorization::{
    Action, Authorization, Clause, Match, PolicyName, PolicyNameError, Rule, Scope,
    ServiceAccountMatch, StringMatch,
};
pub use evaluate::{
    Applicable, Connection, Decision, DenyReason, Evaluation, Permit, Strictness, evaluate,
};
pub use identity::{Identity, IdentityError, Part};
