// How search results rank: titles of pages before words of the glossary, these before titles of sections, and those
// before names of the API; of equals, guides before notebooks and before those that come from another library.
var Scorer = {
  score: ([docname, title, anchor, description, score, filename, kind]) => {
    if (kind === "title" && !anchor) return score + 10;
    if (kind === "index" && docname === "glossary") return score / 5;
    return /^(notebooks|coming_from)\//.test(docname) ? score - 1 : score;
  },
  objNameMatch: 8,
  objPartialMatch: 4,
  objPrio: { 0: 5, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
