//! The few fields of a SentencePiece model (`sentencepiece_model.proto`) that make up a vocabulary: a protobuf message is a list
//! of numbered fields, of which others are passed over.

/// A vocabulary of pieces with their scores, and the table that normalises text before it is cut.
#[derive(Debug, PartialEq)]
pub(super) struct Pieces {
    pub(super) pieces: Vec<Piece>,
    /// SentencePiece's `precompiled_charsmap`; empty when text is taken as it is.
    pub(super) charsmap: Vec<u8>,
}

#[derive(Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    /// Logarithm of its probability.
    pub(super) score: f32,
    pub(super) role: Role,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Normal,
    Unknown,
    Control,
}

impl Pieces {
    /// Reads a model of the kind Unigram.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (mut pieces, mut charsmap) = (Vec::new(), Vec::new());
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => pieces.push(Piece::parse(piece)?),
                (2, Value::Bytes(trainer)) => check_trainer(trainer)?,
                (3, Value::Bytes(normalizer)) => {
                    for field in Fields(normalizer) {
                        if let (2, Value::Bytes(table)) = field? {
                            charsmap = table.to_vec();
                        }
                    }
                }
                _ => {}
            }
        }
        if pieces.is_empty() {
            return Err("is not a SentencePiece model: it has no pieces".into());
        }
        Ok(Self { pieces, charsmap })
    }
}

impl Piece {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (mut text, mut score, mut role) = (None, 0.0, Role::Normal);
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(bytes)) => {
                    text =
                        Some(String::from_utf8(bytes.to_vec()).map_err(|_| "has a piece that is not UTF-8")?);
                }
                (2, Value::Fixed32(bits)) => score = f32::from_bits(bits),
                (3, Value::Number(kind)) => {
                    role = match kind {
                        // Normal, given by the user, unused: all are found in a text.
                        1 | 4 | 5 => Role::Normal,
                        2 => Role::Unknown,
                        3 => Role::Control,
                        6 => return Err("spells unknown characters in bytes, which T5 does not".into()),
                        other => return Err(format!("has a piece of the unknown kind {other}")),
                    }
                }
                _ => {}
            }
        }
        let text = text.filter(|text| !text.is_empty()).ok_or("has a piece without text")?;
        if !score.is_finite() {
            return Err(format!("gives the piece `{text}` the score {score}"));
        }
        Ok(Self { text, score, role })
    }
}

/// Refuses models of another kind than Unigram.
fn check_trainer(bytes: &[u8]) -> Result<(), String> {
    for field in Fields(bytes) {
        if let (3, Value::Number(kind)) = field?
            && kind != 1
        {
            let name =
                ["unigram", "BPE", "word", "char"].get((kind as usize).wrapping_sub(1)).unwrap_or(&"unknown");
            return Err(format!("is a SentencePiece model of the kind {name}, expected unigram"));
        }
    }
    Ok(())
}

/// The fields of a message, in order, each with its number.
struct Fields<'a>(&'a [u8]);

#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Number(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

impl<'a> Fields<'a> {
    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let tag = self.number()?;
        let value = match tag & 7 {
            0 => Value::Number(self.number()?),
            1 => self.take(8).map(|_| Value::Fixed64)?,
            2 => {
                let n = usize::try_from(self.number()?).ok()?;
                Value::Bytes(self.take(n)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(*self.take(4)?.first_chunk()?)),
            _ => return None,
        };
        Some((tag >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| "is damaged, or not a SentencePiece model".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, content.len() as u8], content].concat()
    }

    fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
        let score = [&[2 << 3 | 5][..], &score.to_le_bytes()].concat();
        bytes(1, &[&bytes(1, text.as_bytes())[..], &score, &[3 << 3, kind]].concat())
    }

    #[test]
    fn pieces_and_table_are_found_between_other_fields() {
        let model = [
            piece("<unk>", 0.0, 2),
            piece("▁a", -1.5, 1),
            // The trainer's settings: its kind, and a number of several bytes.
            bytes(2, &[3 << 3, 1, 4 << 3, 0xf4, 0x03]),
            bytes(3, &bytes(2, b"table")),
            // A field of eight bytes that nobody asks for.
            vec![9 << 3 | 1, 1, 2, 3, 4, 5, 6, 7, 8],
        ]
        .concat();
        let parsed = Pieces::parse(&model).unwrap();
        assert_eq!(parsed.charsmap, b"table");
        assert_eq!(parsed.pieces[0].role, Role::Unknown);
        assert_eq!(parsed.pieces[1], Piece { text: "▁a".into(), score: -1.5, role: Role::Normal });
        for length in 0..model.len() {
            // A file that is cut between two fields cannot be told from a shorter one.
            let _ = Pieces::parse(&model[..length]);
        }
        assert!(Pieces::parse(&model[..5]).unwrap_err().contains("damaged"));
    }

    #[test]
    fn other_models_are_refused_by_name() {
        for (model, expected) in [
            (vec![], "no pieces"),
            (b"version https://git-lfs".to_vec(), "damaged"),
            ([piece("a", 0.0, 1), bytes(2, &[3 << 3, 2])].concat(), "kind BPE"),
            (piece("<0x0A>", 0.0, 6), "bytes"),
            (piece("", 0.0, 1), "without text"),
            (piece("a", f32::NAN, 1), "NaN"),
            (piece("a", 0.0, 9), "kind 9"),
        ] {
            let error = Pieces::parse(&model).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
