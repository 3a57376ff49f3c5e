// One response at a time, token by token: how far the policy had moved from what sampled it.

import { get, throttled } from "../api.js";
import { bucketColour, buttons, clear, empty, h, number } from "../dom.js";

const SORTS = [["recorded", "as recorded"], ["ratio", "largest |log-ratio|"], ["age", "oldest token"], ["reward", "highest reward"], ["length", "longest"]];
const LABELS = { behavior: ["behaviour, log μ", "as the engine sampled it"], step_start: ["step start, log π_V", "the learner's weights when the step began"],
  policy: ["policy, log π_θ", "when the token's gradient was taken"], reference: ["reference, log π_ref", "the frozen policy of the KL term"] };

export function create({ run, runs }) {
  const pick = { step: null, sort: "ratio", offset: 0, row: null };
  let mode = "ratio", list = null, shown = null, steps = [];
  const slider = h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Recorded step" });
  const exact = h("input", { type: "number", min: 0, "aria-label": "Step" });
  const sort = h("select", { "aria-label": "Order" }, SORTS.map(([value, text]) => h("option", { value, selected: value === pick.sort }, text)));
  const items = h("ul", { class: "list" }), pager = h("div", { class: "pager" });
  const picker = h("section", { class: "card picker" }, h("div", { class: "head" }, h("h2", {}, "Responses"),
    h("div", { class: "controls" }, h("label", {}, "step", exact), slider), h("div", { class: "controls" }, h("label", {}, "order", sort))), items, pager);
  const view = h("section", { class: "card", style: { minHeight: "420px" } });
  const whole = h("div", { class: "split" }, picker, view);

  const reload = throttled(loadList, 2500);
  async function loadList() {
    list = await get(`runs/${run}/responses`, { step: pick.step, sort: pick.sort, offset: pick.offset });
    steps = list.steps;
    if (!steps.length) {
      const every = runs[run].settings.rollouts_every;
      clear(whole, h("section", { class: "card", style: { gridColumn: "1 / -1" } }, empty("No rollouts recorded",
        every === 0 ? "This run was told to keep none: records.rollouts_every=0." : "The first recorded step will appear here.", 260)));
      return;
    }
    if (!picker.isConnected) clear(whole, picker, view);
    slider.max = steps.length - 1;
    slider.value = steps.indexOf(list.step);
    if (document.activeElement !== exact) exact.value = list.step;
    drawList();
    const same = list.responses.find((one) => one.row === pick.row);
    if (!shown || shown.step !== list.step || !same) await open(same ?? list.responses[0]);
  }

  function drawList() {
    clear(items, ...list.responses.map((one) => h("li", {}, h("button", { type: "button", "data-row": one.row, "aria-current": one.row === pick.row ? "true" : null, onclick: () => open(one) },
      h("span", { class: "line" }, h("span", { class: "text mono" }, one.prompt_text.slice(-60), h("b", {}, one.response_text.slice(0, 80) || "(empty)")), h("span", { class: "reward" }, number(one.reward, 2))),
      h("span", { class: "meta" }, `max |log-ratio| ${number(one.ratio)} · age ${one.age} · ${one.tokens} tokens${one.cut ? ` · ${one.cut} cut` : ""}`)))));
    const last = Math.min(list.total, list.offset + list.responses.length);
    const move = (text, offset) => h("button", { class: "button", type: "button", disabled: offset < 0 || offset >= list.total, onclick: () => { pick.offset = offset; pick.row = null; shown = null; reload.now(); } }, text);
    clear(pager, move("◀", list.offset - 60), h("span", {}, `${list.total ? list.offset + 1 : 0}–${last} of ${list.total}`), move("▶", list.offset + 60));
  }

  async function open(one) {
    if (!one) return;
    pick.row = one.row;
    for (const button of items.querySelectorAll("button")) {
      if (Number(button.dataset.row) === one.row) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    shown = await get(`runs/${run}/response`, { step: list.step, row: one.row });
    drawResponse();
  }

  function drawResponse() {
    const fact = (label, value) => h("span", {}, `${label} `, h("b", {}, String(value)));
    const choice = buttons("Colour", [["ratio", "log-ratio"], ["age", "staleness"], ["state", "clip and mask"]], mode, (chosen) => { mode = chosen; paint(text, key); });
    const text = h("div", { class: "text-view", role: "listbox", "aria-label": "Tokens; arrow keys move between them", "aria-orientation": "horizontal" });
    const key = h("p", { class: "small soft keys" });
    const detail = h("div", { class: "detail", "aria-live": "polite" });
    const source = { text: "one character a token", decoded: "decoded by the run's tokenizer", ids: "token ids: no checkpoint with a tokenizer yet" }[shown.source];
    clear(view, h("header", {}, h("h2", {}, `Response ${shown.sample} to prompt in slot ${shown.slot}`), h("span", { class: "right" }, choice)),
      h("div", { class: "facts" }, fact("step", shown.step), fact("reward", number(shown.reward)), fact("advantage", number(shown.advantage)), fact("worker", shown.worker), fact("attempt", shown.attempt),
        fact("ended by", shown.finish_reason === "length" ? "length limit" : "itself"), fact("took", `${shown.seconds} s`), fact("shown", source)), text, key, detail);
    text.append(h("span", { class: "prompt" }, shown.prompt_text));
    shown.texts.forEach((piece, i) => text.append(token(piece, i, text, detail)));
    paint(text, key);
    if (shown.texts.length) describe(detail, 0, text);
  }

  function token(piece, i, text, detail) {
    const special = /^<.+>$/.test(piece) || shown.source === "ids";
    const move = (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: shown.texts.length - 1 }[event.key];
      const next = to === undefined ? null : text.querySelector(`[data-token="${to}"]`);
      if (next) { event.preventDefault(); next.focus(); }
    };
    return h("button", { type: "button", role: "option", class: `tok${special ? " special" : ""}`, "data-token": i, tabindex: i === 0 ? 0 : -1, "aria-selected": "false",
      onmouseenter: () => describe(detail, i, text), onfocus: () => describe(detail, i, text), onkeydown: move }, piece === "" ? "·" : piece.replaceAll("\n", "⏎\n"));
  }

  function paint(text, key) {
    const reach = Math.max(0.05, ...shown.log_ratio.map((value) => Math.abs(value ?? 0)));
    for (const element of text.querySelectorAll(".tok")) {
      const i = Number(element.dataset.token), ratio = shown.log_ratio[i] ?? 0;
      const share = Math.round(70 * Math.min(1, Math.abs(ratio) / reach));
      element.style.backgroundColor = mode === "ratio" ? `color-mix(in srgb, var(--${ratio < 0 ? "c1" : "c2"}) ${share}%, transparent)`
        : mode === "age" ? `color-mix(in srgb, var(--${bucketColour(shown.ages[i])}) 42%, transparent)` : "transparent";
      element.classList.toggle("untrained", !shown.trained[i]);
      element.classList.toggle("clipped", mode === "state" && shown.clipped[i]);
      element.classList.toggle("masked", mode === "state" && shown.masked[i]);
    }
    if (mode === "ratio") clear(key, "log π_θ − log μ, nats: ", number(-reach), h("span", { class: "ramp" }), `+${number(reach)}`);
    else if (mode === "age") clear(key, h("span", { class: "legend" }, "staleness", [...new Set(shown.ages)].sort().map((age) => h("span", { class: "key" }, h("span", { class: "swatch block", style: { background: `var(--${bucketColour(age)})` } }), String(age)))));
    else clear(key, "orange underline: clipped · red, struck through: masked by the correction · dotted: not trained on");
  }

  function describe(detail, i, text) {
    for (const element of text.querySelectorAll(".tok")) {
      const here = Number(element.dataset.token) === i;
      element.setAttribute("aria-selected", String(here));
      element.tabIndex = here ? 0 : -1;
    }
    const row = (label, value, tip) => h("tr", {}, h("th", { scope: "row", "data-tip": tip ?? null }, label), h("td", { class: "number" }, value));
    const logs = Object.entries(shown.logprobs).map(([name, values]) => row(LABELS[name][0], values[i] === null ? "–" : signed(values[i]), LABELS[name][1]));
    const state = [shown.trained[i] ? "trained" : "not trained on", shown.clipped[i] ? "clipped" : "", shown.masked[i] ? "masked" : ""].filter(Boolean).join(", ");
    clear(detail,
      h("table", {}, h("tbody", {}, logs)),
      h("table", {}, h("tbody", {}, row("token", `${JSON.stringify(shown.texts[i])}, id ${shown.ids[i]}, place ${i + 1} of ${shown.ids.length}`),
        row("log-ratio", shown.log_ratio[i] === null ? "–" : `${signed(shown.log_ratio[i])}  (ratio ${number(Math.exp(shown.log_ratio[i]))})`),
        row("version, age", `${shown.versions[i]}, ${shown.ages[i]} behind the learner`), row("state", state))));
  }

  const signed = (value) => (value < 0 ? `−${Math.abs(value).toFixed(4)}` : value.toFixed(4));
  const choose = (step) => { pick.step = step; pick.offset = 0; pick.row = null; reload.now(); };
  slider.addEventListener("input", () => { exact.value = steps[slider.value]; });
  slider.addEventListener("change", () => choose(steps[slider.value]));
  exact.addEventListener("change", () => choose(exact.value === "" ? null : Number(exact.value)));
  sort.addEventListener("change", () => { pick.sort = sort.value; pick.offset = 0; pick.row = null; shown = null; reload.now(); });
  let seen = -1;
  return {
    element: whole,
    // A step that was chosen stays; until then the first response that was there stays open, and only the list of steps grows.
    summary(now) { if (now.recorded !== seen) { seen = now.recorded; if (pick.step === null && shown) pick.step = shown.step; reload.ask(); } },
    destroy: () => reload.stop(),
  };
}
