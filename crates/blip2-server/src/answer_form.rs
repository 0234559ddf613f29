//! What an answer has to be, as the interfaces say it.

use blip2::text::AnswerForm;
use serde_json::Value as Json;

use crate::error::ApiError;

/// What an answer has to be, and which field of the request says so.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Form {
    pub(crate) form: AnswerForm,
    pub(crate) param: &'static str,
}

/// OpenAI's field and those of vLLM, old and new; at most one may ask for something.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FormFields<'a> {
    pub(crate) response_format: Option<&'a Json>,
    pub(crate) structured_outputs: Option<&'a Json>,
    pub(crate) guided_json: Option<&'a Json>,
    pub(crate) guided_regex: Option<&'a Json>,
    pub(crate) guided_choice: Option<&'a Json>,
    pub(crate) guided_grammar: Option<&'a Json>,
}

impl FormFields<'_> {
    pub(crate) fn form(&self) -> Result<Option<Form>, ApiError> {
        type Read = fn(&'static str, &Json) -> Result<Option<AnswerForm>, ApiError>;
        let fields: [(&'static str, Option<&Json>, Read); 6] = [
            ("response_format", self.response_format, response_format),
            ("structured_outputs", self.structured_outputs, structured_outputs),
            ("guided_json", self.guided_json, schema),
            ("guided_regex", self.guided_regex, regex),
            ("guided_choice", self.guided_choice, choice),
            ("guided_grammar", self.guided_grammar, grammar),
        ];
        let mut found: Option<Form> = None;
        for (param, value, read) in fields {
            let Some(value) = value.filter(|value| !value.is_null()) else { continue };
            let Some(form) = read(param, value)? else { continue };
            if let Some(other) = &found {
                let message =
                    format!("{} and {param} both say what the answer has to be: give one", other.param);
                return Err(ApiError::invalid(param, message));
            }
            found = Some(Form { form, param });
        }
        Ok(found)
    }
}

/// Ollama's `format`: `"json"`, or a schema.
pub(crate) fn of_ollama(format: Option<&Json>) -> Result<Option<Form>, ApiError> {
    let param = "format";
    let form = match format {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::String(text)) if text.is_empty() => return Ok(None),
        Some(Json::String(text)) if text == "json" => AnswerForm::JsonObject,
        Some(Json::Object(schema)) => AnswerForm::JsonSchema(Json::Object(schema.clone())),
        Some(_) => return Err(ApiError::invalid(param, "format is neither \"json\" nor a JSON schema")),
    };
    Ok(Some(Form { form, param }))
}

fn response_format(param: &'static str, value: &Json) -> Result<Option<AnswerForm>, ApiError> {
    match value["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(AnswerForm::JsonObject)),
        Some("json_schema") => match &value["json_schema"]["schema"] {
            Json::Null => Err(ApiError::invalid(param, "response_format.json_schema has no schema")),
            given => schema(param, given),
        },
        _ => {
            let message = "response_format.type is none of text, json_object and json_schema";
            Err(ApiError::unsupported(param, message))
        }
    }
}

fn structured_outputs(param: &'static str, value: &Json) -> Result<Option<AnswerForm>, ApiError> {
    let Json::Object(fields) = value else {
        return Err(ApiError::invalid(param, "structured_outputs is not an object"));
    };
    let mut found = None;
    for (name, value) in fields {
        // Written out by clients that leave a field unset.
        if value.is_null() || *value == Json::Bool(false) {
            continue;
        }
        let form = match name.as_str() {
            "json" => schema(param, value)?,
            "json_object" if *value == Json::Bool(true) => Some(AnswerForm::JsonObject),
            "regex" => regex(param, value)?,
            "choice" => choice(param, value)?,
            _ => {
                let message = "structured_outputs takes one of json, json_object, regex and choice";
                return Err(ApiError::unsupported(param, message));
            }
        };
        if found.is_some() {
            return Err(ApiError::invalid(param, "structured_outputs asks for several forms: give one"));
        }
        found = form;
    }
    Ok(found)
}

/// A schema as JSON, or as a text of JSON.
fn schema(param: &'static str, value: &Json) -> Result<Option<AnswerForm>, ApiError> {
    let schema = match value {
        Json::String(text) => serde_json::from_str(text).ok(),
        Json::Object(_) | Json::Bool(true) => Some(value.clone()),
        _ => None,
    };
    let schema = schema.ok_or_else(|| ApiError::invalid(param, format!("{param} has no JSON schema")))?;
    Ok(Some(AnswerForm::JsonSchema(schema)))
}

fn regex(param: &'static str, value: &Json) -> Result<Option<AnswerForm>, ApiError> {
    let invalid = || ApiError::invalid(param, format!("{param} has no text for its regular expression"));
    let pattern = value.as_str().filter(|pattern| !pattern.is_empty()).ok_or_else(invalid)?;
    Ok(Some(AnswerForm::Regex(pattern.into())))
}

fn choice(param: &'static str, value: &Json) -> Result<Option<AnswerForm>, ApiError> {
    let texts = value.as_array().and_then(|choices| {
        choices.iter().map(|choice| choice.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
    });
    let invalid = || ApiError::invalid(param, format!("{param} is no list of texts to choose from"));
    Ok(Some(AnswerForm::Choice(texts.ok_or_else(invalid)?)))
}

fn grammar(param: &'static str, _: &Json) -> Result<Option<AnswerForm>, ApiError> {
    Err(ApiError::unsupported(param, "grammars are not supported here; guided_regex and guided_json are"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn form(fields: &Json) -> Result<Option<AnswerForm>, ApiError> {
        let field = |name: &str| fields.get(name);
        let fields = FormFields {
            response_format: field("response_format"),
            structured_outputs: field("structured_outputs"),
            guided_json: field("guided_json"),
            guided_regex: field("guided_regex"),
            guided_choice: field("guided_choice"),
            guided_grammar: field("guided_grammar"),
        };
        Ok(fields.form()?.map(|form| form.form))
    }

    #[test]
    fn every_way_to_say_it_is_understood() {
        let schema = json!({"type": "boolean"});
        let of_schema = Some(AnswerForm::JsonSchema(schema.clone()));
        let choice = Some(AnswerForm::Choice(vec!["a".into(), "b".into()]));
        for (fields, expected) in [
            (json!({}), None),
            (json!({"response_format": null, "guided_json": null}), None),
            (json!({"response_format": {"type": "text"}, "guided_choice": ["a", "b"]}), choice.clone()),
            (json!({"response_format": {"type": "json_object"}}), Some(AnswerForm::JsonObject)),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
                of_schema.clone(),
            ),
            (json!({"structured_outputs": {"json": schema, "regex": null}}), of_schema.clone()),
            (json!({"structured_outputs": {"json": schema.to_string()}}), of_schema.clone()),
            (json!({"structured_outputs": {"json_object": true}}), Some(AnswerForm::JsonObject)),
            (json!({"structured_outputs": {"json_object": false, "choice": ["a", "b"]}}), choice),
            (json!({"structured_outputs": {"regex": "a+"}}), Some(AnswerForm::Regex("a+".into()))),
            (json!({"guided_json": schema}), of_schema),
            (json!({"guided_regex": "a+"}), Some(AnswerForm::Regex("a+".into()))),
        ] {
            assert_eq!(form(&fields).expect("understood"), expected, "{fields}");
        }
        let of = |format: Json| of_ollama(Some(&format)).expect("understood").map(|form| form.form);
        assert_eq!(of(json!("json")), Some(AnswerForm::JsonObject));
        assert_eq!(of(json!({"type": "boolean"})), Some(AnswerForm::JsonSchema(json!({"type": "boolean"}))));
        assert_eq!((of(json!("")), of(Json::Null), of_ollama(None).expect("understood")), (None, None, None));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (fields, param, code) in [
            (json!({"response_format": {"type": "xml"}}), "response_format", "unsupported_value"),
            (json!({"response_format": "json"}), "response_format", "unsupported_value"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format", "invalid_value"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}),
                "response_format",
                "invalid_value",
            ),
            (json!({"structured_outputs": ["a"]}), "structured_outputs", "invalid_value"),
            (
                json!({"structured_outputs": {"grammar": "root ::= a"}}),
                "structured_outputs",
                "unsupported_value",
            ),
            (
                json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}),
                "structured_outputs",
                "invalid_value",
            ),
            (json!({"structured_outputs": {"choice": "a"}}), "structured_outputs", "invalid_value"),
            (json!({"guided_json": "{"}), "guided_json", "invalid_value"),
            (json!({"guided_regex": 5}), "guided_regex", "invalid_value"),
            (json!({"guided_choice": [1]}), "guided_choice", "invalid_value"),
            (json!({"guided_grammar": "x"}), "guided_grammar", "unsupported_value"),
            (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice", "invalid_value"),
        ] {
            let error = form(&fields).expect_err("refused");
            assert_eq!((error.param.as_deref(), error.code), (Some(param), code), "{fields}");
        }
        for format in [json!("xml"), json!(3), json!(["a"])] {
            assert_eq!(of_ollama(Some(&format)).expect_err("refused").param.as_deref(), Some("format"));
        }
    }
}
