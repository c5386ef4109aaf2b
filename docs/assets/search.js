// The theme looks up each word of a query as a prefix: "in" is on every page (inference), "weights" misses "weight".
// So words of grammar and single characters are left out, unless there are no others, and the rest lose their endings.
const GRAMMAR = new Set(
  ("an and another any are as at be been by can could do does each for from get give given had has have how if in into is " +
    "it its like make many me more must my need no not of on one only or other our out over own put should so some such than that " +
    "the their them then there these this those to two up us use used using want was way we what when where which who why " +
    "will with without would you your").split(" "),
);

function stems(query) {
  if (/"|[:*~^]|(^|\s)[+-]/.test(query)) return query; // the operators of the search
  const words = query.split(/\s+/).filter((word) => word.length > 1 && !GRAMMAR.has(word.toLowerCase()));
  return words.length ? words.map((word) => word.replace(/(?<=[a-z]{4})(ies|ing|ed|es|s|e|y)$/, "")).join(" ") : query;
}

const QUERY = 2; // among the theme's messages
const post = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message, ...rest) {
  return post.call(this, message.type === QUERY ? { ...message, data: stems(message.data) } : message, ...rest);
};
