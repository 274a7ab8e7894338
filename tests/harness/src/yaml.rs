//! Writes plain data as block YAML. Strings are quoted as JSON quotes them, which YAML reads alike. Called by `mesh`.

use serde_json::Value;

/// One document.
pub(crate) fn document(value: &Value) -> String {
    let mut out = String::new();
    block(value, 0, &mut out);
    out
}

fn block(value: &Value, depth: usize, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, item) in map {
                out.push_str(&"  ".repeat(depth));
                out.push_str(&key_text(key));
                out.push(':');
                nested(item, depth + 1, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                out.push_str(&"  ".repeat(depth));
                out.push('-');
                nested(item, depth + 1, out);
            }
        }
        // Scalars and what is empty read the same in JSON.
        scalar => {
            out.push_str(&scalar.to_string());
            out.push('\n');
        }
    }
}

/// What follows a key or a dash: a scalar on the same line, anything else below.
fn nested(value: &Value, depth: usize, out: &mut String) {
    let below = match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    out.push(if below { '\n' } else { ' ' });
    block(value, depth, out);
}

/// Words and numbers stay bare: a port, which the format has as a number, must not become a string.
fn key_text(key: &str) -> String {
    let all = |test: fn(&u8) -> bool| !key.is_empty() && key.as_bytes().iter().all(test);
    let plain = all(u8::is_ascii_alphabetic) || all(u8::is_ascii_digit);
    if plain {
        key.to_owned()
    } else {
        Value::from(key).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_and_quoting() {
        let value = serde_json::json!({"a": [{"b/c": {"80": 8080}}, "x: y"], "e": [], "n": null});
        let expected = "a:\n  -\n    \"b/c\":\n      80: 8080\n  - \"x: y\"\ne: []\nn: null\n";
        assert_eq!(document(&value), expected);
    }
}
