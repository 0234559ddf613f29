//! Whether a generated answer names what is in the picture.

/// Whether the answer contains any of the names (or aliases) as whole words, in any case, with or without
/// diacritics and punctuation: "a painting by VINCENT VAN GOGH." names "Vincent van Gogh", "Romeo" does not name
/// "Rome", and "van Eycks" does not name "van Eyck". A name without a letter or digit is never found.
#[must_use]
pub fn names_any(answer: &str, names: &[impl AsRef<str>]) -> bool {
    let answer = plain_words(answer);
    names.iter().any(|name| {
        let name = plain_words(name.as_ref());
        !name.is_empty() && answer.windows(name.len()).any(|words| *words == *name)
    })
}

/// Lower-case words of letters and digits, without diacritics. A possessive "'s" becomes a word of its own.
fn plain_words(text: &str) -> Vec<String> {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars().flat_map(char::to_lowercase) {
        match base_letters(c) {
            Some(base) => plain.push_str(base),
            None if is_combining_mark(c) => {}
            None if c.is_alphanumeric() => plain.push(c),
            None => plain.push(' '),
        }
    }
    plain.split_whitespace().map(str::to_owned).collect()
}

/// Accents written as characters of their own after the letter.
fn is_combining_mark(c: char) -> bool {
    matches!(c, '\u{300}'..='\u{36f}')
}

/// What a lower-case letter of Latin-1 or Latin Extended-A (and the few later ones that European, Romanian and
/// Vietnamese names need most) is written as on an English keyboard.
fn base_letters(c: char) -> Option<&'static str> {
    Some(match c {
        'à' | 'á' | 'â' | 'ã' | 'ä' | 'å' | 'ā' | 'ă' | 'ą' | 'ǎ' => "a",
        'æ' => "ae",
        'ç' | 'ć' | 'ĉ' | 'ċ' | 'č' => "c",
        'ď' | 'đ' | 'ð' => "d",
        'è' | 'é' | 'ê' | 'ë' | 'ē' | 'ĕ' | 'ė' | 'ę' | 'ě' => "e",
        'ĝ' | 'ğ' | 'ġ' | 'ģ' => "g",
        'ĥ' | 'ħ' => "h",
        'ì' | 'í' | 'î' | 'ï' | 'ĩ' | 'ī' | 'ĭ' | 'į' | 'ı' | 'ǐ' => "i",
        '\u{133}' => "ij",
        'ĵ' => "j",
        'ķ' => "k",
        'ĺ' | 'ļ' | 'ľ' | 'ŀ' | 'ł' => "l",
        'ñ' | 'ń' | 'ņ' | 'ň' => "n",
        'ò' | 'ó' | 'ô' | 'õ' | 'ö' | 'ø' | 'ō' | 'ŏ' | 'ő' | 'ơ' | 'ǒ' => "o",
        'œ' => "oe",
        'ŕ' | 'ŗ' | 'ř' => "r",
        'ś' | 'ŝ' | 'ş' | 'š' | 'ș' => "s",
        'ß' => "ss",
        'ţ' | 'ť' | 'ŧ' | 'ț' => "t",
        'þ' => "th",
        'ù' | 'ú' | 'û' | 'ü' | 'ũ' | 'ū' | 'ŭ' | 'ů' | 'ű' | 'ų' | 'ư' | 'ǔ' => "u",
        'ŵ' => "w",
        'ý' | 'ÿ' | 'ŷ' => "y",
        'ź' | 'ż' | 'ž' => "z",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_counts_as_whole_words_only() {
        let van_gogh = ["The Starry Night", "Vincent van Gogh", "van Gogh"];
        for answer in
            ["starry night, the starry night", "It is Van Gogh's work", "by VINCENT  VAN\nGOGH.", "van-gogh"]
        {
            assert!(names_any(answer, &van_gogh), "{answer:?}");
        }
        for answer in ["", "starry night", "gogh van", "van goghs", "caravan gogh", "van de gogh"] {
            assert!(!names_any(answer, &van_gogh), "{answer:?}");
        }
        assert!(!names_any("Romeo and Juliet", &["Rome"]));
    }

    #[test]
    fn diacritics_do_not_matter_on_either_side() {
        let pairs = [
            ("edouard manet", "Édouard Manet"),
            ("Édouard Manet", "edouard manet"),
            ("E\u{301}douard Manet", "Edouard Manet"),
            ("albrecht dürer", "Albrecht Durer"),
            ("Malmo", "Malmö"),
            ("Lodz", "Łódź"),
            ("İstanbul", "Istanbul"),
            ("ÇATALHÖYÜK", "catalhoyuk"),
        ];
        for (answer, name) in pairs {
            assert!(names_any(answer, &[name]), "{answer} {name}");
        }
    }

    #[test]
    fn a_name_without_letters_is_never_found() {
        assert!(!names_any("anything", &["", " - "]));
        assert!(!names_any("anything", &[] as &[&str]));
        assert!(!names_any("", &["x"]));
    }
}
