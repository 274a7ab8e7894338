//! Integration tests: see `netns/`.
