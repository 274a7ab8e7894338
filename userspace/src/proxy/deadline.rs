//! Waiting for a peer, with a deadline unless the operator wants none (`CULVERT_LENIENT`). For handshakes.

use std::{future::Future, time::Duration};

use tokio::time::timeout;

/// What the future comes to.
///
/// # Errors
/// The deadline, if that was over first.
pub(super) async fn within<F: Future>(
    deadline: Option<Duration>,
    future: F,
) -> Result<F::Output, Duration> {
    match deadline {
        Some(deadline) => timeout(deadline, future).await.map_err(|_| deadline),
        None => Ok(future.await),
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn only_a_deadline_ends_the_wait() {
        let moment = Duration::from_millis(20);
        assert_eq!(within(Some(moment), pending::<()>()).await, Err(moment));
        let late = tokio::time::sleep(moment * 2);
        assert_eq!(within(None, late).await, Ok(()));
    }
}
