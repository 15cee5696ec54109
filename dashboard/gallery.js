// The gallery: a board (prompts down, base, champion and candidate across) or a grid of cards, reviewed by keyboard.
// Text reaches the page through textContent only. Reviews go to POST /api/events through a queue that survives reloads.

const SIZES = { S: 0.7, M: 1, L: 1.5 };
const views = new WeakMap(); // one view per mounted place; Streamlit calls the default export again at every rerun

export default function gallery({ data, parentElement }) {
  const view = views.get(parentElement) ?? new View(parentElement);
  views.set(parentElement, view);
  view.update(data);
}

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name in node && name !== "role") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function picture(src, src2x, alt) {
  const image = el("img", { alt, loading: "lazy", decoding: "async", width: 256, height: 256, draggable: false });
  if (src2x) image.srcset = `${src} 1x, ${src2x} 2x`;
  image.src = src;
  image.addEventListener("error", () => image.closest("figure")?.classList.add("gone"));
  return image;
}

function drawRelated({ src, alt, note }) {
  return el("div", { className: "related" }, picture(src, null, alt), el("span", { textContent: note }));
}

// reviews on their way to the server --------------------------------------------------------------------------------

const outbox = {
  entries: [],
  token: null,
  reviewer: "",
  note: "",
  sending: false,
  wait: 500,
  heard: new Set(),

  open(reviewer, token) {
    if (this.reviewer !== reviewer) document.cookie =
      `safelight_reviewer=${encodeURIComponent(reviewer)}; path=/; max-age=31536000; SameSite=Strict`;
    Object.assign(this, { reviewer, token });
    if (!this.loaded) {
      this.loaded = true;
      try { this.entries = JSON.parse(localStorage.getItem("safelight.outbox") ?? "[]"); } catch { this.entries = []; }
    }
    this.send();
  },
  mine() { return this.entries.filter((entry) => entry.reviewer === this.reviewer); },
  save() { try { localStorage.setItem("safelight.outbox", JSON.stringify(this.entries)); } catch { /* private mode */ } },
  tell(generation, answer) { this.heard.forEach((hear) => hear(generation, answer)); },

  put(generation, kind, value, text) {
    this.entries.push({ key: uuid(), generation, kind, value, text, reviewer: this.reviewer });
    this.save();
    this.tell();
    this.send();
  },

  async send() {
    if (this.sending) return;
    this.sending = true;
    clearTimeout(this.timer);
    for (let entry; (entry = this.mine()[0]);) {
      const { reviewer, ...body } = entry;
      let status = 0, answer = {};
      try {
        const response = await fetch("/api/events", {
          method: "POST", keepalive: true, body: JSON.stringify(body),
          headers: { "Content-Type": "application/json", "X-Safelight-Reviewer": this.token ?? "" },
        });
        status = response.status;
        answer = await response.json();
      } catch { /* no answer: the same as a busy server */ }
      if (status === 401 || status === 403) { this.note = answer.error ?? "reload this page to go on reviewing"; break; }
      if (status === 0 || status === 429 || status >= 500) {
        this.note = "not saved yet, trying again";
        this.timer = setTimeout(() => this.send(), this.wait);
        this.wait = Math.min(this.wait * 2, 30000);
        break;
      }
      this.wait = 500;
      this.note = status === 200 ? "" : `not saved: ${answer.error ?? status}`;
      this.entries = this.entries.filter((other) => other.key !== entry.key);
      this.save();
      this.tell(entry.generation, status === 200 ? answer : null);
    }
    this.sending = false;
    this.tell();
  },
};

function uuid() { // crypto.randomUUID exists on secure origins only
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// one mounted gallery -----------------------------------------------------------------------------------------------

class View {
  constructor(parent) {
    this.cards = new Map(); // id -> {card, cell}
    this.lines = [];        // rows of ids, as drawn
    this.root = el("div", { className: "gallery" });
    this.tools = el("div", { className: "tools" });
    this.body = el("div", { className: "body" });
    this.box = el("dialog", { className: "box", tabIndex: -1, autofocus: true });
    this.box.addEventListener("close", () => { this.unflip(); this.cards.get(this.at)?.cell.focus(); });
    this.box.addEventListener("click", (event) => { if (event.target === this.box) this.box.close(); });
    this.root.append(this.tools, this.body, this.box);
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("keyup", (event) => { if (event.key === " ") this.unflip(); });
    this.root.addEventListener("focusout", () => this.unflip());
    this.body.addEventListener("focusin", (event) => this.arrive(event.target.closest(".cell")?.dataset.id));
    this.body.addEventListener("click", (event) => this.click(event));
    parent.appendChild(this.root);
    outbox.heard.add((generation, answer) => this.hear(generation, answer));
  }

  update(data) {
    const shape = JSON.stringify(data, (name, value) => (name === "standing" || name === "token" ? undefined : value));
    this.data = data;
    const cards = data.layout === "board" ? data.rows.flatMap((row) => Object.values(row.cells)) : data.cards;
    if (shape !== this.shape) {
      this.shape = shape;
      if (this.box.open) this.box.close();
      this.cards = new Map(cards.map((card) => [card.id, { card }]));
      data.layout === "board" ? this.drawBoard() : this.drawCards();
      this.drawTools();
      if (!this.cards.has(this.at)) this.at = this.lines.flat()[0];
      this.rove();
    } else {
      for (const card of cards) this.cards.get(card.id).card.standing = card.standing;
    }
    for (const id of this.cards.keys()) this.refresh(id);
    this.status();
    if (data.token) outbox.open(data.reviewer, data.token);
  }

  // drawing

  drawTools() {
    const size = localStorage.getItem("safelight.size") ?? "M";
    this.root.style.setProperty("--scale", SIZES[size] ?? 1);
    const sizes = Object.keys(SIZES).map((name) => el("button", {
      type: "button", textContent: name, title: `picture size ${name}`, "aria-pressed": String(name === size),
      onclick: () => { localStorage.setItem("safelight.size", name); this.drawTools(); this.status(); },
    }));
    const keys = [["arrows", "move"], ["Enter", "open"]];
    if (this.data.token) keys.push(["0–5", "stars"], ["X", "flag"], ["C", "comment"]);
    if (this.data.flips) keys.push(["hold Space", "flip to base"]);
    this.said = el("span", { className: "said", role: "status" });
    this.tools.replaceChildren(
      el("div", { className: "legend" }, ...keys.map(([key, what]) => el("span", {}, el("kbd", { textContent: key }), ` ${what}`))),
      this.said, el("div", { className: "sizes", role: "group", "aria-label": "picture size" }, ...sizes));
  }

  drawBoard() {
    const { columns, rows } = this.data;
    this.root.style.setProperty("--columns", columns.length);
    this.lines = [];
    const head = el("div", { className: "line head", role: "row" }, el("span", { role: "columnheader", textContent: "prompt" }),
      ...columns.map((column) => el("span", { role: "columnheader" },
        el("b", { textContent: column.label }), " ", el("small", { textContent: column.note }))));
    const lines = rows.map((row) => {
      const shown = columns.filter((column) => row.cells[column.key]);
      this.lines.push(shown.map((column) => row.cells[column.key].id));
      return el("div", { className: "line", role: "row" },
        el("div", { className: "prompt", role: "rowheader" }, el("span", { textContent: row.title, title: row.title }),
          el("small", { textContent: row.note }), ...(row.related ?? []).map(drawRelated)),
        ...columns.map((column) => row.cells[column.key]
          ? this.drawCell(row.cells[column.key])
          : el("div", { className: "missing", role: "gridcell", textContent: "not drawn" })));
    });
    this.body.replaceChildren(el("div", { className: "board", role: "grid", "aria-label": this.data.label }, head, ...lines));
  }

  drawCards() {
    this.lines = [this.data.cards.map((card) => card.id)];
    this.body.replaceChildren(el("div", { className: "cards", role: "grid", "aria-label": this.data.label },
      el("div", { className: "flow", role: "row" }, ...this.data.cards.map((card) => this.drawCell(card)))));
  }

  drawCell(card) {
    const cell = el("div", { className: "cell", role: "gridcell", tabIndex: -1 });
    cell.dataset.id = card.id;
    const figure = el("figure", {}, card.src ? picture(card.src, card.src2x, card.alt) : null,
      el("span", { className: "flipped", textContent: "" }), this.drawTags(card));
    if (!card.src) figure.classList.add("gone");
    cell.append(figure);
    if (card.standing) cell.append(this.drawReview(card));
    if (this.data.layout !== "board") cell.append(el("div", { className: "caption" },
      el("span", { textContent: card.title }), el("small", { textContent: card.note })));
    this.cards.get(card.id).cell = cell;
    return cell;
  }

  drawTags(card) {
    return el("span", { className: "tags" }, ...(card.tags ?? []).map(([text, tone]) =>
      el("span", { className: `tag ${tone}`, textContent: text })));
  }

  drawReview(card) {
    const off = !this.data.token;
    const stars = [1, 2, 3, 4, 5].map((value) => el("button", {
      type: "button", className: "star", tabIndex: -1, disabled: off, textContent: "★", title: `${value} stars`,
      "aria-label": `${value} of 5 stars`, onclick: () => this.rate(card, value === card.standing.stars ? 0 : value),
    }));
    const flag = el("button", { type: "button", className: "flag", tabIndex: -1, disabled: off, textContent: "⚑",
      title: "flag", "aria-label": "flag", onclick: () => this.flag(card) });
    return el("div", { className: "review" }, el("span", { className: "stars" }, ...stars), flag,
      el("small", { className: "others" }));
  }

  // Show what stands for a card, in its cell and in the lightbox.
  refresh(id) {
    const { card, cell } = this.cards.get(id);
    if (card.standing) {
      for (const entry of outbox.mine()) {
        if (entry.generation !== card.generation) continue;
        if (entry.kind === "stars") card.standing.stars = entry.value;
        if (entry.kind === "flag") card.standing.flag = entry.value === 1;
      }
    }
    const places = [cell.querySelector(".review")];
    if (this.box.open && this.at === id) places.push(this.box.querySelector(".review"));
    for (const place of places.filter(Boolean)) {
      const { stars, flag, mean, raters, flags } = card.standing;
      place.classList.toggle("rated", stars > 0 || flag);
      place.querySelectorAll(".star").forEach((star, index) => star.classList.toggle("on", index < stars));
      place.querySelector(".flag").classList.toggle("on", flag);
      place.querySelector(".flag").setAttribute("aria-pressed", String(flag));
      const others = [];
      if (raters > (stars > 0 ? 1 : 0)) others.push(`⌀ ${mean.toFixed(1)} (${raters})`);
      if (flags > (flag ? 1 : 0)) others.push(`⚑ ${flags}`);
      if (card.standing.comments.length) others.push(`✎ ${card.standing.comments.length}`);
      place.querySelector(".others").textContent = others.join("  ");
    }
    cell.classList.toggle("flagged", Boolean(card.standing?.flag));
    const said = card.standing?.stars ? `, ${card.standing.stars} of 5 stars` : "";
    cell.setAttribute("aria-label", `${card.alt}${said}${card.standing?.flag ? ", flagged" : ""}`);
  }

  status() {
    const waiting = outbox.mine().length;
    const who = this.data.token ? `reviewing as ${this.data.reviewer}` : "";
    this.said.textContent = outbox.note || (waiting ? `saving ${waiting}…` : this.saved ? `${who} · saved ✓` : who);
    this.said.classList.toggle("trouble", Boolean(outbox.note));
  }

  // reviewing

  rate(card, value) {
    if (!this.data.token || !card.standing) return;
    card.standing.stars = value;
    outbox.put(card.generation, "stars", value, null);
    this.refresh(card.id);
  }

  flag(card) {
    if (!this.data.token || !card.standing) return;
    card.standing.flag = !card.standing.flag;
    outbox.put(card.generation, "flag", card.standing.flag ? 1 : 0, null);
    this.refresh(card.id);
  }

  comment(card, text) {
    card.standing.comments.push({ by: this.data.reviewer, text, at: "now" });
    outbox.put(card.generation, "comment", null, text);
    this.refresh(card.id);
  }

  hear(generation, answer) {
    if (!this.root.isConnected || !this.shape) return;
    if (answer) {
      this.saved = true;
      const { stars, flag, mean, raters, flags } = answer;
      for (const [id, { card }] of this.cards) {
        if (card.generation !== generation || !card.standing) continue;
        Object.assign(card.standing, { stars, flag, mean, raters, flags });
        this.refresh(id);
      }
    }
    this.status();
  }

  // moving

  arrive(id) {
    if (!id) return;
    this.at = id;
    this.rove();
    const partner = this.cards.get(this.cards.get(id).card.flip)?.card;
    if (partner?.src) new Image().src = partner.src; // so that the first flip is instant
  }

  rove() {
    for (const [id, { cell }] of this.cards) cell.tabIndex = id === this.at ? 0 : -1;
  }

  neighbour(right, down) {
    let lines = this.lines;
    if (this.data.layout !== "board") {
      const top = this.cards.get(lines[0][0]).cell.offsetTop;
      const across = lines[0].filter((id) => this.cards.get(id).cell.offsetTop === top).length;
      const flat = lines[0].indexOf(this.at) + right + down * across;
      return lines[0][flat];
    }
    const row = lines.findIndex((line) => line.includes(this.at));
    const column = lines[row].indexOf(this.at) + right;
    const line = lines[row + down] ?? [];
    return line[down ? Math.min(column, line.length - 1) : column];
  }

  move(right, down) {
    const id = this.neighbour(right, down);
    if (!id) return;
    this.at = id;
    if (this.box.open) this.fillBox();
    else this.cards.get(id).cell.focus();
    this.cards.get(id).cell.scrollIntoView({ block: "nearest" });
    this.rove();
  }

  key(event) {
    event.stopPropagation(); // Streamlit's own R and C must not fire
    if (event.target.matches?.("textarea, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const inside = event.target.closest(".cell") || this.box.open;
    const pressesButton = event.target.closest?.("button") && !event.target.closest(".cell") && " Enter".includes(event.key);
    const entry = this.cards.get(this.at);
    if (!inside || !entry || pressesButton) return;
    const { card } = entry;
    const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (moves[name]) this.move(...moves[name]);
    else if (/^[0-5]$/.test(name) && !event.repeat) this.rate(card, Number(name));
    else if (name === "x" && !event.repeat) this.flag(card);
    else if (name === "c" && card.standing) { this.openBox(); this.box.querySelector("textarea")?.focus(); }
    else if (name === "Enter") this.openBox();
    else if (name === " ") { if (!event.repeat) this.flip(); }
    else return;
    event.preventDefault();
  }

  click(event) {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    this.arrive(cell.dataset.id);
    cell.focus({ preventScroll: true });
    if (!event.target.closest("button")) this.openBox();
  }

  flip() {
    const { card, cell } = this.cards.get(this.at);
    const partner = this.cards.get(card.flip)?.card;
    const figure = this.box.open ? this.box.querySelector("figure") : cell.querySelector("figure");
    if (!partner?.src || !figure || this.flipped) return;
    const over = el("img", { className: "over", alt: partner.alt, src: this.box.open ? partner.src2x : partner.src });
    this.flipped = { figure, over };
    figure.querySelector(".flipped").textContent = partner.role;
    const turn = () => { if (this.flipped?.over === over) { figure.append(over); figure.classList.add("turned"); } };
    over.complete ? turn() : over.addEventListener("load", turn); // never the new label over the old picture
  }

  unflip() {
    this.flipped?.figure.classList.remove("turned");
    this.flipped?.over.remove();
    this.flipped = null;
  }

  // the lightbox

  openBox() {
    if (!this.box.open) this.box.showModal();
    this.fillBox();
  }

  fillBox() {
    this.unflip();
    const { card } = this.cards.get(this.at);
    const partner = this.cards.get(card.flip)?.card;
    if (partner?.src2x) new Image().src = partner.src2x;
    const line = this.lines.find((ids) => ids.includes(this.at)) ?? [];
    const figure = el("figure", {}, card.src ? picture(card.src2x ?? card.src, null, card.alt) : null,
      el("span", { className: "flipped", textContent: "" }), el("span", { className: "role", textContent: card.role ?? "" }));
    if (!card.src) figure.classList.add("gone");
    const strip = this.data.layout !== "board" ? null : el("div", { className: "strip" }, ...line.map((id) => {
      const other = this.cards.get(id).card;
      return el("button", { type: "button", "aria-pressed": String(id === this.at), onclick: () => { this.at = id; this.rove(); this.fillBox(); } },
        picture(other.src, null, ""), el("span", { textContent: other.role }));
    }));
    const hold = !partner ? null : el("button", { type: "button", className: "hold", textContent: `hold to see ${partner.role}`,
      onpointerdown: () => this.flip(), onpointerup: () => this.unflip(), onpointerleave: () => this.unflip() });
    const step = (text, label, right, down) => el("button", { type: "button", textContent: text, title: label,
      "aria-label": label, disabled: !this.neighbour(right, down), onclick: () => this.move(right, down) });
    const board = this.data.layout === "board";
    this.box.replaceChildren(
      el("div", { className: "stage" }, figure, el("div", { className: "under" }, strip, hold)),
      el("div", { className: "side" },
        el("div", { className: "turn" },
          step("←", "previous picture", board ? 0 : -1, board ? -1 : 0), step("→", "next picture", board ? 0 : 1, board ? 1 : 0),
          el("button", { type: "button", className: "close", textContent: "✕", title: "close", "aria-label": "close", onclick: () => this.box.close() })),
        el("h3", { textContent: card.title }), this.drawTags(card),
        card.standing ? this.drawReview(card) : null,
        el("dl", {}, ...(card.facts ?? []).flatMap(([name, value]) => [el("dt", { textContent: name }), el("dd", { textContent: value })])),
        ...(card.related ?? []).map(drawRelated),
        card.standing ? this.drawComments(card) : null));
    this.box.setAttribute("aria-label", card.alt);
    this.refresh(card.id);
  }

  drawComments(card) {
    const said = card.standing.comments.map((comment) => el("li", {},
      el("b", { textContent: comment.by }), el("small", { textContent: ` ${comment.at}` }), el("p", { textContent: comment.text })));
    const field = el("textarea", { rows: 2, maxLength: 2000, placeholder: "Comment on this picture", "aria-label": "comment" });
    const send = () => {
      const text = field.value.trim();
      if (!text) return;
      this.comment(card, text);
      this.fillBox();
    };
    field.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send(); } });
    const form = !this.data.token ? null : el("div", { className: "say" }, field,
      el("button", { type: "button", textContent: "Comment", onclick: send }));
    return el("section", {}, said.length ? el("ul", { className: "comments" }, ...said) : null, form);
  }
}
