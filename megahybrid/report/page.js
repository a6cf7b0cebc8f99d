"use strict";
(() => {
  const text = (id) => document.getElementById(id).textContent;
  const notice = (words) => {
    const box = document.getElementById("notice");
    box.textContent = words;
    box.hidden = false;
  };

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return await new Response(stream).text();
  }

  // ---- charts
  const coarse = matchMedia("(pointer: coarse)").matches || matchMedia("(max-width: 46rem)").matches;
  const config = { responsive: true, displayModeBar: false, doubleClick: "reset" };
  let figures = JSON.parse(text("the-figures"));

  function draw(root) {
    const drawn = [];
    for (const box of root.querySelectorAll(".plot[data-figure]")) {
      const figure = figures[box.dataset.figure];
      if (!figure) continue;
      // A finger that scrolls the page must not zoom a chart.
      const layout = { ...figure.layout, dragmode: coarse ? false : "zoom" };
      if (coarse) layout.margin = { ...layout.margin, l: 40, r: 8 };
      layout.font = { size: 12 };
      drawn.push(Plotly.react(box, structuredClone(figure.data), structuredClone(layout), config));
    }
    return Promise.all(drawn);
  }

  // ---- tables
  function sort(button) {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const place = [...head.parentNode.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[place], value = cell.dataset.value;
      return cell.classList.contains("none") ? null : value === undefined ? cell.textContent : +value;
    };
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // dashes last, always
      const order = typeof a === "number" && typeof b === "number"
        ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return up ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("th button");
    if (button) sort(button);
  });

  // ---- tools
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  document.getElementById("save").addEventListener("click", async () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([await unpack(packedData)], { type: "application/json" }));
    link.download = document.title.split(" · ")[0].replace(/[^\w.-]+/g, "_") + ".json";
    link.click();
  });
  let packedData = text("the-data");

  // ---- print: charts are set to the width of the paper
  let printing = false;
  function fit(width) {
    for (const box of document.querySelectorAll(".js-plotly-plot")) {
      Plotly.relayout(box, width ? { width, autosize: false } : { width: null, autosize: true });
    }
  }
  addEventListener("beforeprint", () => { if (!printing) { printing = true; fit(640); } });
  addEventListener("afterprint", () => { printing = false; fit(null); });

  // ---- live: what changed is put in place, without a reload
  function place(html) {
    const fresh = new DOMParser().parseFromString(`<main>${html}</main>`, "text/html").querySelector("main");
    const main = document.querySelector("main");
    main.querySelector("header").replaceWith(fresh.querySelector("header"));
    for (const section of fresh.querySelectorAll("section")) {
      const old = document.getElementById(section.id);
      if (!old) { main.append(section); continue; }
      const ids = (root) => [...root.querySelectorAll(".part")].map((part) => part.id).join();
      if (ids(old) !== ids(section)) {
        for (const box of old.querySelectorAll(".js-plotly-plot")) Plotly.purge(box);
        old.replaceWith(section);
        continue;
      }
      for (const part of section.querySelectorAll(".part")) change(document.getElementById(part.id), part);
    }
  }
  function change(old, fresh) {
    if (old.dataset.is === fresh.dataset.is && old.dataset.is) return;
    const open = [...old.querySelectorAll("details")].map((one) => one.open);
    if (old.querySelector(".plot")) {
      for (const name of [".name", ".says", ".numbers"]) {
        old.querySelector(name).replaceWith(fresh.querySelector(name));
      }
      old.dataset.is = fresh.dataset.is;
    } else {
      old.replaceChildren(...fresh.childNodes);
      old.dataset.is = fresh.dataset.is;
    }
    old.querySelectorAll("details").forEach((one, n) => { one.open = open[n] ?? one.open; });
  }
  async function follow(address) {
    const status = document.getElementById("live");
    let version = "";
    for (;;) {
      try {
        const answer = await fetch(`${address}?after=${version}`);
        if (!answer.ok) throw new Error(await answer.text());
        const state = await answer.json();
        if (state.version !== version) {
          version = state.version;
          figures = state.figures;
          packedData = state.data;
          place(state.main);
          await draw(document);
          document.body.dataset.version = version;
        }
        status.textContent = state.status;
        document.getElementById("notice").hidden = true;
        if (state.ended) return;
      } catch (error) {
        status.textContent = "";
        const why = error instanceof TypeError ? "The server has gone:" : `${error.message.trim()} Until then`;
        notice(`${why} this page shows the run as it last was.`);
        await new Promise((done) => setTimeout(done, 3000));
      }
      await new Promise((done) => setTimeout(done, 1000));
    }
  }

  // ---- begin
  (async () => {
    try {
      const script = document.createElement("script");
      script.textContent = await unpack(text("the-library"));
      document.head.append(script);
      document.getElementById("the-library").remove();
    } catch (error) {
      notice("This browser is too old to unpack the charts. The text and tables are complete.");
      return;
    }
    await draw(document);
    document.body.dataset.drawn = document.querySelectorAll(".js-plotly-plot .main-svg").length;
    if (document.body.dataset.live) follow(document.body.dataset.live);
  })();
})();
