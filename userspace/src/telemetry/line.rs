//! One log line, rendered as text or JSON. Pure. Invariant: whatever the values are, the result is exactly one line,
//! no value can end its quotes, and no terminal acts on it; so nobody can forge a line or a field.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::SystemTime;

use time::OffsetDateTime;

use crate::config::LogFormat;

/// A longer value is cut: a peer may not fill the disk with one connection.
const MAX_VALUE: usize = 4096;

/// The value of a field.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// Text, quoted.
    Text(String),
    /// What displays itself, such as an address: bare in text if it is plain, quoted in JSON.
    Plain(String),
    /// A number or truth value, bare in both.
    Literal(String),
}

/// A line before it is rendered.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub time: SystemTime,
    pub level: &'static str,
    pub target: String,
    pub message: String,
    pub fields: Vec<(&'static str, Value)>,
}

impl Line {
    /// The line with its newline.
    pub fn render(&self, format: LogFormat) -> String {
        let mut out = String::with_capacity(512);
        let head = Head {
            time: self.time,
            level: self.level,
            target: &self.target,
            message: &self.message,
        };
        let mut line = Fields::after(&head, format, &mut out);
        for (name, value) in &self.fields {
            match value {
                Value::Plain(text) => line.plain(name, text),
                Value::Literal(text) => line.literal(name, text),
                Value::Text(text) => line.text(name, text),
            }
        }
        line.end();
        out
    }
}

/// What every line begins with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head<'a> {
    pub time: SystemTime,
    pub level: &'static str,
    pub target: &'a str,
    pub message: &'a str,
}

/// A line that is being written, field by field. In text, columns are separated by tabs, fields by spaces, and tabs in
/// values are escaped.
pub(super) struct Fields<'a> {
    out: &'a mut String,
    format: LogFormat,
    separator: char,
}

impl<'a> Fields<'a> {
    pub fn after(head: &Head<'_>, format: LogFormat, out: &'a mut String) -> Self {
        match format {
            LogFormat::Text => {
                timestamp(head.time, out);
                out.push('\t');
                out.push_str(head.level);
                out.push('\t');
                escape(head.target, out);
                out.push('\t');
                escape(head.message, out);
            }
            LogFormat::Json => {
                out.push_str("{\"level\":\"");
                out.push_str(head.level);
                out.push_str("\",\"time\":\"");
                timestamp(head.time, out);
                out.push_str("\",\"scope\":");
                quote(head.target, out);
                out.push_str(",\"message\":");
                quote(head.message, out);
            }
        }
        Self {
            out,
            format,
            separator: '\t',
        }
    }

    fn name(&mut self, name: &str) {
        match self.format {
            LogFormat::Text => {
                self.out.push(self.separator);
                self.separator = ' ';
                self.out.push_str(name);
                self.out.push('=');
            }
            LogFormat::Json => {
                self.out.push_str(",\"");
                self.out.push_str(name);
                self.out.push_str("\":");
            }
        }
    }

    /// Text, quoted.
    pub fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        quote(value, self.out);
    }

    /// Bare in text if it is plain, quoted in JSON.
    pub fn plain(&mut self, name: &str, value: &str) {
        self.name(name);
        match self.format {
            LogFormat::Text if is_plain(value) => self.out.push_str(value),
            _ => quote(value, self.out),
        }
    }

    /// A number or truth value: bare in both.
    pub fn literal(&mut self, name: &str, value: &str) {
        self.name(name);
        match self.format {
            LogFormat::Text if !is_plain(value) => quote(value, self.out),
            _ => self.out.push_str(value),
        }
    }

    pub fn number(&mut self, name: &str, value: u64) {
        self.name(name);
        let _ = write!(self.out, "{value}");
    }

    /// What displays as plain text; for others there is [`Self::plain`].
    pub fn address(&mut self, name: &str, value: SocketAddr) {
        self.name(name);
        let _ = match self.format {
            LogFormat::Text => write!(self.out, "{value}"),
            LogFormat::Json => write!(self.out, "\"{value}\""),
        };
    }

    /// A number with its unit, quoted.
    pub fn amount(&mut self, name: &str, value: u128, unit: &str) {
        self.name(name);
        let _ = write!(self.out, "\"{value}{unit}\"");
    }

    pub fn end(self) {
        if self.format == LogFormat::Json {
            self.out.push('}');
        }
        self.out.push('\n');
    }
}

/// RFC 3339 in UTC with microseconds.
fn timestamp(time: SystemTime, out: &mut String) {
    let t = OffsetDateTime::from(time);
    let _ = write!(
        out,
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        t.year(),
        u8::from(t.month()),
        t.day(),
        t.hour(),
        t.minute(),
        t.second(),
        t.microsecond()
    );
}

/// Whether a value needs no quotes: nothing in it could be taken for another field.
fn is_plain(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".:-_/[]%+@,".contains(&byte);
    !text.is_empty() && text.len() <= MAX_VALUE && text.bytes().all(plain)
}

fn quote(text: &str, out: &mut String) {
    out.push('"');
    escape(text, out);
    out.push('"');
}

/// JSON's escapes, and more than JSON asks for: all control characters (a terminal obeys C1 as well), line and
/// paragraph separators, and characters that change the direction of text.
fn escape(text: &str, out: &mut String) {
    let harmless = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b'"' && byte != b'\\';
    if text.len() <= MAX_VALUE && text.bytes().all(harmless) {
        out.push_str(text);
        return;
    }
    for (at, c) in text.char_indices() {
        if at >= MAX_VALUE {
            out.push('…');
            return;
        }
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() || reorders(c) => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
}

fn reorders(c: char) -> bool {
    matches!(c, '\u{061c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn line(message: &str, fields: Vec<(&'static str, Value)>) -> Line {
        Line {
            time: SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042),
            level: "info",
            target: "access".to_owned(),
            message: message.to_owned(),
            fields,
        }
    }

    #[test]
    fn a_line_has_columns_and_fields() {
        let fields = vec![
            ("src.addr", Value::Plain("[fd00::1]:80".into())),
            ("src.workload", Value::Text("client".into())),
            ("bytes_sent", Value::Literal("5".into())),
        ];
        let line = line("connection complete", fields);
        assert_eq!(
            line.render(LogFormat::Text),
            "2023-11-14T22:13:20.000042Z\tinfo\taccess\tconnection complete\tsrc.addr=[fd00::1]:80 src.workload=\"client\" bytes_sent=5\n"
        );
        assert_eq!(
            line.render(LogFormat::Json),
            "{\"level\":\"info\",\"time\":\"2023-11-14T22:13:20.000042Z\",\"scope\":\"access\",\"message\":\"connection complete\",\
             \"src.addr\":\"[fd00::1]:80\",\"src.workload\":\"client\",\"bytes_sent\":5}\n"
        );
    }

    #[test]
    fn a_value_cannot_forge_a_field_or_a_line() {
        let hostile = "a\" dst.addr=1.2.3.4:5\n2023-01-01T00:00:00Z\tinfo\taccess\tfake\u{1b}[2K\u{9b}2K\u{202e}\u{2028}";
        for value in [Value::Text(hostile.into()), Value::Plain(hostile.into())] {
            let text = line(hostile, vec![("error", value)]).render(LogFormat::Text);
            assert_eq!(text.matches('\n').count(), 1);
            assert_eq!(text.matches('\t').count(), 4);
            assert!(!text.contains(['\u{1b}', '\u{9b}', '\u{202e}', '\u{2028}']));
            let field = text.rsplit('\t').next().unwrap();
            assert!(
                field.starts_with("error=\"a\\\" dst.addr=1.2.3.4:5\\n"),
                "{field}"
            );
        }
    }

    #[test]
    fn an_endless_value_is_cut() {
        let text =
            line("m", vec![("error", Value::Text("é".repeat(1 << 20)))]).render(LogFormat::Text);
        assert!(text.len() < 3 * MAX_VALUE);
    }

    proptest! {
        #[test]
        fn any_text_stays_one_line_and_reads_back(message in any::<String>(), value in any::<String>()) {
            let line = line(&message, vec![("a", Value::Text(value.clone())), ("b", Value::Plain(value.clone()))]);
            let text = line.render(LogFormat::Text);
            prop_assert!(text.strip_suffix('\n').is_some_and(|rest| !rest.chars().any(|c| c.is_control() && c != '\t')));
            prop_assert_eq!(text.matches('\t').count(), 4);
            let json: serde_json::Value = serde_json::from_str(&line.render(LogFormat::Json)).unwrap();
            prop_assert_eq!(json["a"].as_str().unwrap(), value.as_str());
            prop_assert_eq!(json["b"].as_str().unwrap(), value.as_str());
            prop_assert_eq!(json["message"].as_str().unwrap(), message.as_str());
        }
    }
}
