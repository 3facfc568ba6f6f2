"use strict";
(() => {
  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const form = document.getElementById("filters");
  if (!form) return;
  const list = document.getElementById("cards");
  const names = [...form.elements.pair.options].map((option) => option.dataset);
  const cards = [...list.children].map((element, order) => ({
    element,
    order,
    words: element.dataset.words,
    split: element.dataset.split,
    rows: [...element.querySelectorAll("tr[data-system]")],
    pairs: new Map(
      element.dataset.pairs.split(" ").map((entry) => {
        const [pair, differing, outcome] = entry.split(":");
        return [pair, { differing: Number(differing), outcome }];
      }),
    ),
  }));

  function update() {
    const { pair, outcome, split, find } = form.elements;
    const wanted = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const only = names[pair.selectedIndex];
    let shown = 0;
    for (const card of cards) {
      const found = pair.value ? [card.pairs.get(pair.value)].filter(Boolean) : [...card.pairs.values()];
      const fits =
        found.some((entry) => !outcome.value || entry.outcome === outcome.value) &&
        (!split.value || card.split === split.value) &&
        wanted.every((word) => card.words.includes(word));
      card.element.hidden = !fits;
      shown += fits;
      for (const row of card.rows) {
        const system = row.dataset.system;
        row.hidden = Boolean(pair.value) && system !== only.teacher && system !== only.student;
      }
    }
    const rank = (card) => (pair.value ? -(card.pairs.get(pair.value)?.differing ?? 0) : 0);
    list.append(...[...cards].sort((a, b) => rank(a) - rank(b) || a.order - b.order).map((card) => card.element));
    document.getElementById("shown").value = `${shown} utterance${shown === 1 ? "" : "s"}`;
  }

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
})();
