// Fetching, and the one stream of news a page listens to.

export async function get(path, parameters = {}) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null));
  const response = await fetch(`api/${path}${query.size ? `?${query}` : ""}`);
  if (!response.ok) throw new Error(`${response.status}: ${(await response.text()).slice(0, 200)}`);
  return response.json();
}

export async function post(path, body) {
  const response = await fetch(`api/${path}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  if (!response.ok) throw new Error((await response.text()).trim().slice(0, 300));
  return response.json();
}

const MOST_ROWS = 2400; // beyond this the server is asked for fewer points again
const RETRY_MS = 2000;

// Columns of some metrics of some runs: loaded once, then extended by what the stream brings.
export class Live {
  constructor(runs, names, { rows, summary, connection }) {
    Object.assign(this, { runs, names, on: { rows, summary, connection } });
    this.tables = new Map();
    this.visible = () => (document.hidden ? this.pause() : this.resume());
    document.addEventListener("visibilitychange", this.visible);
  }

  async start() {
    await Promise.all(this.runs.map((run) => this.load(run)));
    if (this.stopped) return;
    this.on.rows();
    this.listen();
  }

  async load(run) {
    this.tables.set(run, this.names.length ? await get(`runs/${run}/series`, { names: this.names.join(",") })
      : { generation: 0, cursor: 0, step: [], time: [], values: {}, known: [] });
  }

  listen() {
    if (this.stopped || this.source) return;
    const marks = this.runs.map((run) => `${this.tables.get(run).generation}.${this.tables.get(run).cursor}`);
    const query = new URLSearchParams({ runs: this.runs.join(","), names: this.names.join(",") });
    if (this.names.length) query.set("after", marks.join(","));
    const source = this.source = new EventSource(`api/stream?${query}`);
    source.addEventListener("open", () => this.on.connection(true));
    source.addEventListener("error", () => this.on.connection(false));
    source.addEventListener("summary", (event) => this.on.summary(JSON.parse(event.data)));
    source.addEventListener("rows", (event) => this.extend(JSON.parse(event.data)));
    source.addEventListener("reset", () => this.reload());
    source.addEventListener("closing", () => this.on.connection(false));
  }

  extend(news) {
    const table = this.tables.get(news.run);
    news.step.forEach((step, i) => {
      let place = table.step.length;
      while (place > 0 && table.step[place - 1] > step) place -= 1;
      if (place > 0 && table.step[place - 1] === step) place -= 1;
      else {
        table.step.splice(place, 0, step);
        table.time.splice(place, 0, news.time[i]);
        for (const name of this.names) table.values[name].splice(place, 0, null);
      }
      for (const name of this.names) if (news.values[name][i] !== null) table.values[name][place] = news.values[name][i];
    });
    if (table.step.length > MOST_ROWS) this.reload();
    else this.on.rows();
  }

  // Again until it succeeds: meanwhile the page listens to nothing, and would stand still without a word.
  async reload() {
    this.pause();
    try {
      await Promise.all(this.runs.map((run) => this.load(run)));
    } catch {
      if (this.stopped) return;
      this.on.connection(false);
      this.retry = setTimeout(() => this.reload(), RETRY_MS);
      return;
    }
    if (this.stopped) return;
    this.on.rows();
    this.listen();
  }

  pause() {
    clearTimeout(this.retry);
    this.source?.close();
    this.source = null;
  }

  // What happened while the page was out of sight is fetched, not replayed.
  resume() { if (!this.source && !this.stopped) this.reload(); }

  stop() {
    this.stopped = true;
    this.pause();
    document.removeEventListener("visibilitychange", this.visible);
  }
}

// Calls `work` at once, and again when asked, but never twice at the same time nor more often than `gap` ms.
export function throttled(work, gap) {
  let running = false, wanted = false, last = -Infinity, timer = 0, stopped = false;
  const attempt = async () => {
    timer = 0;
    if (running || stopped) { wanted = true; return; }
    running = true; wanted = false; last = performance.now();
    try { await work(); } finally { running = false; }
    if (wanted) ask();
  };
  const ask = () => { if (!timer && !stopped) timer = setTimeout(attempt, Math.max(0, last + gap - performance.now())); };
  return { ask, now: () => { clearTimeout(timer); timer = 0; return attempt(); }, stop: () => { stopped = true; clearTimeout(timer); } };
}
