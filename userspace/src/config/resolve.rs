//! Putting the layers together: for each setting the strongest layer that has it wins, and every layer is checked.
//! Used by `Config::load` only. Collects errors instead of returning at the first.

use std::collections::HashMap;

use super::error::{ConfigError, ConfigErrors, Origin, quoted};
use super::file::{self, Entry};
use super::values::AuthToken;
use super::{Environment, Flags, Setting, Variable, settings};

/// The values given for each setting, weakest layer first, and what was wrong so far.
pub(super) struct Resolver {
    given: HashMap<&'static str, Vec<(Origin, String)>>,
    errors: Vec<ConfigError>,
}

impl Resolver {
    /// Collects what the layers say.
    pub fn new(flags: &Flags, environment: &Environment) -> Self {
        let mut this = Self {
            given: HashMap::new(),
            errors: Vec::new(),
        };
        if let Some(path) = &flags.config {
            match file::read(path) {
                Ok(entries) => entries
                    .into_iter()
                    .for_each(|entry| this.add_entry(path, entry)),
                Err(error) => this.errors.push(error),
            }
        }
        let variables = settings::ALL.iter().map(|one| (*one, one.variable));
        let istio_s = (&settings::CLUSTER_ID, settings::META_CLUSTER_ID);
        for (setting, variable) in variables.chain([istio_s]) {
            let origin = Origin::Variable(variable);
            match environment.variable(variable) {
                Variable::Unset => {}
                Variable::Text(text) => this.add(setting, origin, text),
                Variable::NotUnicode => this.errors.push(ConfigError::NotUnicode {
                    key: setting.key,
                    origin,
                    expected: setting.expects.to_owned(),
                }),
            }
        }
        for (setting, value) in &flags.values {
            let flag = setting.flag.unwrap_or(setting.key);
            this.add(setting, Origin::Flag(flag), value.clone());
        }
        this
    }

    fn add(&mut self, setting: &Setting, origin: Origin, value: String) {
        self.given
            .entry(setting.key)
            .or_default()
            .push((origin, value));
    }

    fn add_entry(&mut self, path: &std::path::Path, entry: Entry) {
        let origin = |at: &serde_saphyr::Location| Origin::File {
            path: path.to_owned(),
            line: at.line(),
            column: at.column(),
        };
        match settings::by_key(&entry.key.value) {
            Some(setting) => self.add(setting, origin(&entry.value.referenced), entry.value.value),
            None => self.errors.push(ConfigError::UnknownKey {
                key: quoted(&entry.key.value),
                origin: origin(&entry.key.referenced),
                nearest: settings::nearest(&entry.key.value),
            }),
        }
    }

    /// The value of a setting, if any layer has it and it is valid.
    pub fn take<T>(&mut self, setting: &Setting, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let given = self.given.remove(setting.key).unwrap_or_default();
        let mut strongest = None;
        for (origin, value) in given {
            let parsed = parse(&value);
            if parsed.is_none() {
                self.not_valid(setting, &value, origin);
            }
            strongest = parsed;
        }
        strongest
    }

    /// The words of a setting that takes several, separated by commas. Each that is not valid is an error of its own.
    pub fn list<T>(&mut self, setting: &Setting, parse: impl Fn(&str) -> Option<T>) -> Vec<T> {
        let given = self.given.remove(setting.key).unwrap_or_default();
        let mut strongest = Vec::new();
        for (origin, value) in given {
            strongest.clear();
            let words = value.split(',').map(str::trim);
            for word in words.filter(|word| !word.is_empty()) {
                match parse(word) {
                    Some(parsed) => strongest.push(parsed),
                    None => self.not_valid(setting, word, origin.clone()),
                }
            }
        }
        strongest
    }

    fn not_valid(&mut self, setting: &Setting, value: &str, origin: Origin) {
        self.errors.push(ConfigError::Value {
            key: setting.key,
            value: match setting.secret {
                true => AuthToken::SHOWN.to_owned(),
                false => quoted(value),
            },
            origin,
            expected: setting.expects.to_owned(),
        });
    }

    /// The value of a setting, or its default.
    pub fn or<T>(&mut self, setting: &Setting, parse: impl Fn(&str) -> Option<T>, default: T) -> T {
        self.take(setting, parse).unwrap_or(default)
    }

    /// The value of a setting, or a default that this machine may not have.
    pub fn or_missing<T>(
        &mut self,
        setting: &Setting,
        parse: impl Fn(&str) -> Option<T>,
        default: Option<T>,
        reason: &'static str,
        mend: &str,
    ) -> Option<T> {
        let given = self.given.contains_key(setting.key);
        let value = self.take(setting, parse);
        if given || default.is_some() {
            return value.or(default);
        }
        self.errors.push(ConfigError::Missing {
            key: setting.key,
            reason,
            mend: mend.to_owned(),
        });
        None
    }

    /// Notes that two settings were given of which there can be one.
    pub fn contradiction(&mut self, one: &'static Setting, other: &'static Setting) {
        self.errors.push(ConfigError::Contradiction {
            one: one.key,
            variable: one.variable,
            other: other.key,
            other_variable: other.variable,
        });
    }

    /// The variables that begin so, without that beginning. `accepts` looks at the rest of the name and the value.
    pub fn beginning_with(
        &mut self,
        environment: &Environment,
        prefix: &'static str,
        expected: &'static str,
        accepts: impl Fn(&str, &str) -> bool,
    ) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for name in environment.variables.keys() {
            let Some(rest) = name.strip_prefix(prefix).filter(|rest| !rest.is_empty()) else {
                continue;
            };
            match environment.variable(name) {
                Variable::Unset => {}
                Variable::Text(text) if accepts(rest, &text) => found.push((rest.to_owned(), text)),
                // The value may be a secret.
                Variable::Text(_) | Variable::NotUnicode => {
                    self.errors.push(ConfigError::Prefixed {
                        name: quoted(name),
                        expected,
                    });
                }
            }
        }
        found
    }

    /// In a build without test knobs asking for one is an error: a test must not believe that it has switched one off.
    #[cfg(not(feature = "test-knobs"))]
    pub fn refuse_knobs(&mut self, setting: &Setting) {
        for (origin, _) in self.given.remove(setting.key).unwrap_or_default() {
            self.errors.push(ConfigError::NoKnobs { origin });
        }
    }

    /// What was resolved, unless anything at all was wrong.
    pub fn finish<T>(self, resolved: Option<T>) -> Result<T, ConfigErrors> {
        match resolved {
            Some(resolved) if self.errors.is_empty() => Ok(resolved),
            _ => Err(ConfigErrors(self.errors)),
        }
    }
}
