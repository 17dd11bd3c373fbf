// The side-by-side browser. Texts come from models and are hostile: they reach the page through textContent only.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("b-data").textContent);
  const get = (id) => document.getElementById(id);
  const [language, set, split, prompt] = ["b-language", "b-set", "b-split", "b-prompt"].map(get);
  const purposeOf = Object.fromEntries(data.sets.map(([name, purpose]) => [name, purpose]));
  const SET = 0, LANG = 1, PID = 2, SPLIT = 3, TEXT = 4, REFERENCE = 5;
  let shown = []; // places of the prompts that the choices leave

  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const fill = (select, options, keep) => {
    select.replaceChildren(...options.map(([value, text]) => {
      const option = make("option", text);
      option.value = value;
      return option;
    }));
    if (options.some(([value]) => value === keep)) select.value = keep;
  };
  const short = (text) => {
    const letters = Array.from(text.replace(/\s+/g, " ").trim());
    return letters.length > 70 ? letters.slice(0, 69).join("") + "\u2026" : letters.join("");
  };
  const tone = (purpose, verdict) => {
    if (["win", "right", "safe", "correct", "followed"].includes(verdict)) return "good";
    if (["loss", "wrong", "invalid", "harmful", "not_followed"].includes(verdict)) return "bad";
    if (verdict === "refused") return purpose === "harmless" ? "bad" : "good";
    if (verdict === "complied") return purpose === "harmful" ? "bad" : "good";
    return "";
  };
  const FINISH = { length: "cut at the limit", too_long: "prompt too long, not asked" };

  // The parallel prompt stays when language changes; the split stays when the set changes.
  const choose = () => {
    const pid = shown.length ? data.prompts[shown[prompt.selectedIndex]]?.[PID] : undefined;
    const inSet = data.prompts.filter((p) => p[SET] === set.value && p[LANG] === language.value);
    fill(split, ["test", "dev"].filter((s) => inSet.some((p) => p[SPLIT] === s)).map((s) => [s, s]), split.value);
    shown = data.prompts.flatMap((p, i) =>
      p[SET] === set.value && p[LANG] === language.value && p[SPLIT] === split.value ? [i] : []);
    fill(prompt, shown.map((i) => {
      const p = data.prompts[i];
      return [p[PID], p[PID] + "  \u2068" + short(p[TEXT]) + "\u2069"];
    }), pid);
    show();
  };
  const show = () => {
    const at = prompt.selectedIndex, place = shown[at];
    get("b-previous").disabled = at <= 0;
    get("b-next").disabled = at >= shown.length - 1;
    if (place === undefined) {
      get("b-place").textContent = "";
      get("b-text").textContent = "No prompt of this set in this language.";
      get("b-reference-box").hidden = true;
      get("b-answers").replaceChildren();
      return;
    }
    const asked = data.prompts[place];
    get("b-place").textContent = `${asked[PID]}, ${at + 1} of ${shown.length}`;
    get("b-text").textContent = asked[TEXT];
    get("b-reference-box").hidden = asked[REFERENCE] === null;
    get("b-reference").textContent = asked[REFERENCE] ?? "";
    get("b-answers").replaceChildren(...data.candidates.map(([name, kind], i) =>
      reply(name, kind, data.answers[i][place], purposeOf[asked[SET]])));
  };
  const reply = (name, kind, answer, purpose) => {
    const box = make("article", undefined, "reply");
    const head = make("h3", name);
    box.append(head);
    if (answer === null) {
      head.append(make("small", kind));
      box.append(make("p", "no response", "missing"));
      return box;
    }
    const [text, finish, tokens, verdicts] = answer;
    head.append(make("small", `${kind}, ${tokens} tokens`));
    const badges = make("ul", undefined, "badges");
    for (const [judge, verdict] of Object.entries(verdicts))
      badges.append(make("li", `${judge}: ${verdict}`, tone(purpose, verdict)));
    if (FINISH[finish]) badges.append(make("li", FINISH[finish]));
    if (badges.children.length) box.append(badges);
    const body = text.trim() ? make("p", text, "text") : make("p", "empty response", "missing");
    if (text.trim()) body.dir = "auto";
    box.append(body);
    return box;
  };
  const step = (by) => {
    prompt.selectedIndex += by;
    show();
  };

  if (!data.prompts.length) return;
  fill(language, data.languages.map(([code, name]) => [code, name === code ? code : `${name} (${code})`]));
  fill(set, data.sets.map(([name, , title]) => [name, name === title ? name : `${title} (${name})`]));
  for (const select of [language, set, split]) select.addEventListener("change", choose);
  prompt.addEventListener("change", show);
  get("b-previous").addEventListener("click", () => step(-1));
  get("b-next").addEventListener("click", () => step(1));
  get("browser").hidden = false;
  get("b-without").hidden = true;
  choose();
})();
