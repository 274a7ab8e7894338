//! Who may ask: everybody, or who sends the bearer token of a file. The file is read for each call, so that it can be replaced.

use std::path::PathBuf;
use std::sync::Arc;

use tonic::Status;
use tonic::metadata::{KeyAndValueRef, MetadataMap};

const TOKEN: &str = "authorization";
const CLUSTER: &str = "clusterid";
const SCHEME: &str = "Bearer ";

/// The check of a call's token.
#[derive(Debug, Clone)]
pub struct Gate {
    token: Option<Arc<PathBuf>>,
}

/// The headers of a call in a line, sorted, for the log. They may be secrets: of all but the cluster's name, the length.
pub fn shown(headers: &MetadataMap) -> String {
    let mut shown: Vec<String> = headers
        .iter()
        .filter_map(|entry| match entry {
            KeyAndValueRef::Ascii(name, value) if name == CLUSTER => {
                Some(format!("{name}={}", value.to_str().ok()?))
            }
            KeyAndValueRef::Ascii(name, value) => {
                let bytes = value.as_encoded_bytes().len();
                Some(format!("{name}=<{bytes} bytes>"))
            }
            KeyAndValueRef::Binary(..) => None,
        })
        .collect();
    shown.sort();
    shown.join(" ")
}

impl Gate {
    /// Without a file everybody is admitted.
    pub fn new(token: Option<PathBuf>) -> Self {
        Self {
            token: token.map(Arc::new),
        }
    }

    /// Admits a call with these headers.
    ///
    /// # Errors
    /// UNAUTHENTICATED without the right token; UNAVAILABLE if the file cannot be read.
    pub async fn admit(&self, headers: &MetadataMap) -> Result<(), Status> {
        let Some(path) = &self.token else {
            return Ok(());
        };
        let expected = tokio::fs::read_to_string(path.as_ref())
            .await
            .map_err(|error| {
                tracing::error!(path = %path.display(), %error, "the token file cannot be read; nobody is admitted");
                Status::unavailable("the token file cannot be read")
            })?;
        let given = headers
            .get(TOKEN)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix(SCHEME));
        match given {
            Some(given) if !expected.trim().is_empty() && given.trim() == expected.trim() => Ok(()),
            Some(_) => Err(Status::unauthenticated(
                "the bearer token is not the one expected here",
            )),
            None => Err(Status::unauthenticated(
                "send `authorization: Bearer TOKEN`",
            )),
        }
    }
}
