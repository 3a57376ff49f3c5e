// The frame: header, navigation, and one page at a time.

import { Live, get } from "./api.js";
import { clear, duration, empty, h, hideTip, startTips } from "./dom.js";

const PAGES = { overview: "Overview", staleness: "Staleness", importance: "Importance", fleet: "Fleet", tokens: "Tokens", compare: "Compare" };
const state = { runs: [], catalogue: {}, page: null, live: null, run: 0, name: "overview", ticket: 0 };
const $ = (id) => document.getElementById(id);

// `#/tokens/1`: a page, and which run when there are several.
function place() {
  const [, name, run] = location.hash.split("/");
  const known = name in PAGES && (name !== "compare" || state.runs.length > 1);
  return { name: known ? name : "overview", run: state.runs[Number(run)] ? Number(run) : 0 };
}

const address = (name, run = state.run) => `#/${name}${run ? `/${run}` : ""}`;

function meaning(name) {
  const base = name.replace(/\/by_(staleness|sign)\/.*/, "");
  const found = state.catalogue[base];
  if (!found) return name;
  const part = name === base ? "" : `\nonly ${name.slice(base.length + 4).replace("/", " ")}`;
  return `${name}${found.unit === "1" ? "" : ` (${found.unit})`}\n${found.meaning}${part}`;
}

function drawNav() {
  const links = Object.entries(PAGES).filter(([name]) => name !== "compare" || state.runs.length > 1);
  const nav = $("nav");
  if (nav.children.length !== links.length) {
    clear(nav, ...links.map(([name, title]) => h("a", { "data-page": name, href: address(name) }, title)));
  }
  for (const link of nav.children) {
    link.setAttribute("href", address(link.dataset.page));
    if (link.dataset.page === state.name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function drawName() {
  const box = $("run-name");
  if (state.runs.length < 2) { box.textContent = state.runs[0].name; return; }
  if (!box.firstElementChild) {
    const names = state.runs.map((run) => run.name);
    const label = (run, i) => (names.indexOf(run.name) === names.lastIndexOf(run.name) ? run.name : `${run.name} (${i + 1})`);
    clear(box, h("select", { "aria-label": "Run", onchange: (event) => { location.hash = address(state.name, Number(event.target.value)); } },
      state.runs.map((run, i) => h("option", { value: i }, label(run, i)))));
  }
  box.firstElementChild.value = String(state.run);
}

const PHASE_TIPS = {
  starting: "It has reported nothing yet.", running: "Its files are growing.", finished: "It has written its last checkpoint.",
  stale: "It has not ended, and has written nothing for a while.",
};

function drawHeader() {
  const run = state.runs[state.run];
  drawName();
  const phase = $("phase");
  phase.className = `phase ${run.phase}`;
  phase.textContent = run.phase;
  phase.dataset.tip = PHASE_TIPS[run.phase] ?? "";
  phase.tabIndex = 0;
  clear($("step-count"), "step ", h("b", {}, String(run.step)), run.steps ? ` of ${run.steps}` : "");
  $("step-fill").style.width = `${run.steps ? Math.min(100, 100 * run.step / run.steps) : 0}%`;
  const since = (Date.now() - run.received) / 1000;
  $("elapsed").textContent = duration(run.elapsed === null ? null : run.elapsed + (run.phase === "running" ? since : 0));
  document.title = `${run.name} · ${PAGES[state.name]} · rlsys`;
}

function heard(summary) {
  state.runs[summary.id] = { ...summary, received: Date.now() };
  drawHeader();
  if (summary.id === state.run || state.name === "compare") state.page?.summary?.(state.runs[summary.id]);
}

let lost = 0;
function connection(up) {
  if (up) { clearTimeout(lost); lost = 0; $("connection").hidden = true; return; }
  // A server that is only restarting is back within seconds. What fails meanwhile does not put the message off.
  lost ||= setTimeout(() => {
    $("connection").hidden = false;
    $("connection").textContent = "The dashboard's server does not answer. What is shown is as of its last word; it goes on by itself when the server is back.";
  }, 4000);
}

async function show() {
  const { name, run } = place();
  const ticket = ++state.ticket;
  state.live?.stop();
  state.page?.destroy?.();
  hideTip();
  const moved = state.page !== null;
  Object.assign(state, { name, run, page: null, live: null });
  drawNav();
  drawHeader();
  const module = await import(`./pages/${name}.js`);
  if (ticket !== state.ticket) return;
  const page = module.create({ run, runs: state.runs, meaning });
  state.page = page;
  clear($("main"), ...[page.element].flat());
  if (moved) { scrollTo(0, 0); $("main").focus({ preventScroll: true }); }
  const live = new Live(page.runs ?? [run], page.names ?? [], {
    rows: () => page.rows?.(live.tables), summary: heard, connection,
  });
  state.live = live;
  page.summary?.(state.runs[run]);
  await live.start();
}

const shown = () => show().catch((error) => {
  clear($("main"), h("section", { class: "card" }, empty("This page could not be loaded.", String(error.message ?? error), 160)));
});

async function begin() {
  startTips();
  if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", location.pathname + location.hash);
  $("theme").addEventListener("click", () => window.rlsysTheme.toggle());
  const sign = () => { $("theme").textContent = document.documentElement.dataset.theme === "dark" ? "☀" : "☾"; };
  document.addEventListener("themechange", sign);
  sign();
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
  [state.runs, state.catalogue] = await Promise.all([get("runs"), get("catalogue")]);
  for (const run of state.runs) run.received = Date.now();
  addEventListener("hashchange", shown);
  setInterval(drawHeader, 1000);
  await shown();
}

begin().catch((error) => clear($("main"), empty("The dashboard could not be loaded.", String(error.message ?? error), 200)));
