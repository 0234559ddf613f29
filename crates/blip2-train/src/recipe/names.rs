//! Names of places, works and people as they are written, and what else they are called.

/// Places whose name in the collection (every word capitalised, no apostrophes) is not how it is written.
const WRITTEN: &[(&str, &str)] = &[
    ("St Pauls Cathedral", "St Paul's Cathedral"),
    ("Hadrians Wall", "Hadrian's Wall"),
    ("Kings College Chapel", "King's College Chapel"),
    ("Shakespeares Birthplace", "Shakespeare's Birthplace"),
    ("Giants Causeway", "Giant's Causeway"),
    ("Musee Dorsay", "Musee d'Orsay"),
    ("Basilique Fourviere", "Basilica of Fourviere"),
    ("Mont Saint Michel", "Mont Saint-Michel"),
    ("Notre Dame De Paris", "Notre-Dame de Paris"),
    ("Palais Des Papes Avignon", "Palais des Papes"),
];

/// What else a place is called, by its name in the collection.
const ALIASES: &[(&str, &[&str])] = &[
    ("Palace Of Westminster", &["Houses of Parliament", "Westminster Palace", "Big Ben"]),
    ("St Pauls Cathedral", &["St Pauls", "St Paul's", "Saint Paul's Cathedral"]),
    ("Hadrians Wall", &["Hadrian Wall"]),
    ("Kings College Chapel", &["King's College"]),
    ("Giants Causeway", &["Giant Causeway"]),
    ("Hampton Court", &["Hampton Court Palace"]),
    ("Royal Crescent", &["Royal Crescent Bath"]),
    ("Snowdon", &["Yr Wyddfa", "Mount Snowdon"]),
    ("Louvre Museum", &["Louvre"]),
    ("Palace Of Versailles", &["Versailles"]),
    ("Notre Dame De Paris", &["Notre Dame", "Notre-Dame Cathedral"]),
    ("Musee Dorsay", &["d'Orsay", "Orsay"]),
    ("Centre Pompidou", &["Pompidou"]),
    ("Basilique Fourviere", &["Fourviere"]),
    ("Sacre Coeur", &["Sacre-Coeur", "Sacred Heart"]),
    ("Mont Saint Michel", &["Mont St Michel"]),
    ("Carcassonne", &["Cite de Carcassonne"]),
    ("Chateau De Chambord", &["Chambord"]),
    ("Chateau De Chenonceau", &["Chenonceau"]),
    ("Palais Des Papes Avignon", &["Palace of the Popes", "Popes' Palace"]),
    ("Dune Du Pilat", &["Dune of Pilat", "Pilat"]),
    ("Gorges Du Verdon", &["Verdon Gorge", "Verdon"]),
    ("Carnac Standing Stones", &["Carnac stones", "Carnac"]),
    ("Lascaux Cave", &["Lascaux"]),
    ("Hospices De Beaune", &["Hotel-Dieu de Beaune", "Beaune"]),
    ("Calanques De Piana", &["Piana"]),
    ("Arles Amphitheatre", &["Arles Arena"]),
    ("Millau Viaduct", &["Viaduc de Millau"]),
    ("Shakespeares Birthplace", &["Shakespeare's House"]),
    ("New York", &["New York City"]),
    ("Rio De Janeiro", &["Rio"]),
    ("Delhi", &["New Delhi"]),
    ("Mumbai", &["Bombay"]),
    ("Angkor", &["Angkor Wat"]),
];

/// Words that are written small inside a name.
const SMALL: [&str; 6] = ["Of", "The", "De", "Du", "Des", "And"];

/// How a place of the collection is written.
pub(super) fn place(collected: &str) -> String {
    if let Some((_, written)) = WRITTEN.iter().find(|(name, _)| *name == collected) {
        return (*written).to_owned();
    }
    // Capitals in the middle of "Rio de Janeiro"'s particle are small; the first word keeps its own.
    let words = collected.split(' ').enumerate();
    let words: Vec<String> = words
        .map(|(i, word)| if i > 0 && SMALL.contains(&word) { word.to_lowercase() } else { word.to_owned() })
        .collect();
    words.join(" ")
}

/// All names of a place.
pub(super) fn of_place(collected: &str) -> Vec<String> {
    let mut names = vec![place(collected)];
    let aliases = ALIASES.iter().find(|(name, _)| *name == collected).map_or(&[][..], |(_, aliases)| aliases);
    for name in std::iter::once(&collected).chain(aliases) {
        if !names.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            names.push((*name).to_owned());
        }
    }
    names
}

/// What a photo shows of its place ("Eiffel Tower Paris" → "Eiffel Tower, Paris."); `None` when the view says no more
/// than the place.
pub(super) fn view(view: &str, collected: &str) -> Option<String> {
    let name = place(collected);
    let (view_lower, place_lower) = (view.to_lowercase(), collected.to_lowercase());
    if view_lower == place_lower || view_lower == name.to_lowercase() || view.trim().is_empty() {
        return None;
    }
    match view_lower.strip_suffix(&place_lower) {
        Some(rest) if rest.ends_with(' ') => Some(format!("{}, {name}.", &view[..rest.trim_end().len()])),
        _ if view_lower.contains(&place_lower) => Some(format!("{view}.")),
        _ => Some(format!("{view}, {name}.")),
    }
}

/// A title without remarks in brackets and without what follows a semicolon or a line break.
pub(super) fn title(title: &str) -> String {
    let mut plain = String::new();
    let mut depth = 0usize;
    for c in title.chars() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth = depth.saturating_sub(1),
            ';' | '\n' if !plain.trim().is_empty() => break,
            _ if depth == 0 => plain.push(c),
            _ => {}
        }
    }
    let plain = plain.split_whitespace().collect::<Vec<_>>().join(" ").replace(['"', '“', '”'], "");
    if plain.is_empty() { title.to_owned() } else { plain }
}

/// The painter, when one is known by name ("Workshop of …", "Italian; Tuscany" are not).
pub(super) fn artist(artist: &str) -> Option<&str> {
    let lower = artist.to_lowercase();
    let vague = [
        "unknown",
        "attributed",
        "after ",
        "workshop",
        "follower",
        "style of",
        "imitator",
        "circle of",
        "school",
        "manner of",
        "possibly",
        "copy",
        "studio",
        "master",
        "monogrammist",
    ];
    let nations = [
        "italian",
        "flemish",
        "french",
        "spanish",
        "dutch",
        "german",
        "english",
        "belgian",
        "netherlandish",
        "american",
        "british",
    ];
    let is_vague = artist.contains([';', '\n', '?']) || vague.iter().any(|word| lower.contains(word));
    (!is_vague && !nations.contains(&lower.as_str())).then_some(artist)
}

/// "1st", "2nd", "3rd", "11th".
pub(super) fn ordinal(number: u32) -> String {
    let suffix = match (number % 100, number % 10) {
        (11..=13, _) => "th",
        (_, 1) => "st",
        (_, 2) => "nd",
        (_, 3) => "rd",
        _ => "th",
    };
    format!("{number}{suffix}")
}

/// The names, and each that has accents also without them: people and models write both.
pub(super) fn with_plain_letters(names: Vec<String>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for name in names {
        let plain: String = name.chars().map(plain_letter).collect();
        for name in [name, plain] {
            if !all.contains(&name) {
                all.push(name);
            }
        }
    }
    all
}

fn plain_letter(letter: char) -> char {
    match letter {
        'á' | 'à' | 'â' | 'ä' | 'ã' => 'a',
        'é' | 'è' | 'ê' | 'ë' => 'e',
        'É' | 'È' => 'E',
        'í' | 'ì' | 'î' | 'ï' => 'i',
        'ó' | 'ò' | 'ô' | 'ö' => 'o',
        'ú' | 'ù' | 'û' | 'ü' => 'u',
        'ç' => 'c',
        'ñ' => 'n',
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_written_as_people_write_them() {
        assert_eq!(place("Rio De Janeiro"), "Rio de Janeiro");
        assert_eq!(place("White Cliffs Of Dover"), "White Cliffs of Dover");
        assert_eq!(place("St Pauls Cathedral"), "St Paul's Cathedral");
        assert_eq!(place("The Hague"), "The Hague");
        assert!(of_place("Palace Of Westminster").contains(&"Houses of Parliament".to_owned()));
        assert_eq!(of_place("Petra"), ["Petra"]);
    }

    #[test]
    fn views_say_what_the_place_does_not() {
        assert_eq!(view("Eiffel Tower Paris", "Paris").as_deref(), Some("Eiffel Tower, Paris."));
        assert_eq!(view("Louvre pyramid", "Paris").as_deref(), Some("Louvre pyramid, Paris."));
        assert_eq!(view("Stonehenge aerial", "Stonehenge").as_deref(), Some("Stonehenge aerial."));
        assert_eq!(view("stonehenge", "Stonehenge"), None);
    }

    #[test]
    fn titles_and_artists_are_plain() {
        assert_eq!(title("Sea View, Calm Weather (Vue de mer, temps calme)"), "Sea View, Calm Weather");
        assert_eq!(title("Christ; Saint Peter"), "Christ");
        assert_eq!(title("(untitled)"), "(untitled)");
        assert_eq!(artist("Claude Monet"), Some("Claude Monet"));
        for vague in
            ["After Jacobo Bassano", "Italian; Tuscany", "Artist unknown", "Flemish", "Workshop of X\nor Y"]
        {
            assert_eq!(artist(vague), None, "{vague}");
        }
        assert_eq!(
            [1, 2, 3, 4, 11, 12, 13, 21, 22].map(ordinal).join(" "),
            "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd"
        );
        assert_eq!(with_plain_letters(vec!["Édouard Manet".into()]), ["Édouard Manet", "Edouard Manet"]);
    }
}
