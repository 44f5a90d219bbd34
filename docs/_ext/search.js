// What the search of built pages finds first: node search.js FOLDER QUERY ... prints the page for each query, as JSON.
const fs = require("fs");
const vm = require("vm");

const [folder, ...queries] = process.argv.slice(2);
const page = {
  document: { getElementById: () => null, addEventListener: () => {}, readyState: "loading" },
  localStorage: { setItem: () => {} },
  SPHINX_HIGHLIGHT_ENABLED: false,
  _: (text) => text,
  _ready: () => {},
};
page.window = page;
vm.createContext(page);
for (const name of ["_static/language_data.js", "_static/searchtools.js", "searchindex.js"])
  vm.runInContext(fs.readFileSync(`${folder}/${name}`, "utf8"), page, { filename: name });
const found = queries.map((query) => {
  page.query = query;
  const results = vm.runInContext("Search._performSearch(...Search._parseQuery(query))", page);
  return results.length ? results.at(-1)[0] : null; // the last is shown first
});
console.log(JSON.stringify(found));
